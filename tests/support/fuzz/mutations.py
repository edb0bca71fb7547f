"""Mutations of files: of JSON values by their structure, and of bytes by chance.

All are drawn from one generator, so a seed and a number name an input.
"""

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

NUMBERS = (
    0, -0.0, 1, -1, 2, 3, 7, 0.5, -0.5, 1e-9, 1e-300, 5e-324, 1e9, 1e300, 1.7976931348623157e308, 2**31, 2**53,
    2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
NAMES = (
    "", " ", "\0", "\x1b[2J\x1b[31m", "a\nb", "'\"\\", "../../etc/passwd", "/etc/passwd", "<script>alert(1)</script>",
    "[bold red]x[/]", "%s%n{0}", "ﷺ" * 40, "\u202etxt", "e\u0301\u0302", "🤖", "\ud83e", "None", "NaN", "1e999",
    "__class__", "os:system", "sample", "out_channel", "replicate", "gpu", "gpu0", "conv", "1f1b", "interleaved",
    "x" * 2000,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [{}], {"": None}, {"gpu": "sample"}, [0, 0], [1] * 300)
TOKENS = (
    b"NaN", b"-Infinity", b"1e999", b"-1e999", b"1" * 5000, b"0x10", b"\\ud800", b"\\u0000", b"\xff\xfe",
    b"\xed\xa0\x80", b"[" * 300, b'{"a":' * 300, b"]", b"}", b",", b":", b'"', b"null", b"true", b"/*", b"\0",
    b"\xef\xbb\xbf", b"0", b"-", b"e9",
)  # fmt: skip
DEPTHS = (1, 2, 30, 150, 400, 700, 950, 3000, 100_000)
_DEEP = "is replaced by lists in lists"
NESTED, REPEATED = 0.05, 0.03
"""Shares of the JSON files with such a value, and with a repeated key."""
MOST_COPIES = 400
MAX_BYTES = 4_000_000
"""Of a mutated file; sizes of their own are tried apart."""

Rng = np.random.Generator
Place = tuple[Any, Any]
"""A list or dict, and the index or key in it."""


def mutated(seeds: Sequence[bytes], rng: Rng) -> bytes:
    """Return one of the files with a few mutations; JSON by its structure, as bytes, or both."""
    raw = pick(seeds, rng)
    kind = rng.random()
    if kind < 0.8:
        raw = _structured(raw, seeds, rng)
    if kind > 0.6 or raw is None:
        raw = scrambled(raw or pick(seeds, rng), rng)
    return raw[:MAX_BYTES]


def pick(choices: Sequence[Any], rng: Rng) -> Any:
    """Return one of the choices."""
    return choices[int(rng.integers(len(choices)))]


def scrambled(raw: bytes, rng: Rng) -> bytes:
    """Return bytes with some of them changed, lost, repeated or put in."""
    found = bytearray(raw)
    for _ in range(1 + int(rng.integers(4))):
        at, more = int(rng.integers(len(found) + 1)), int(rng.integers(1, 60))
        match int(rng.integers(6)):
            case 0 if at < len(found):
                found[at] ^= 1 << int(rng.integers(8))
            case 1:
                del found[at : at + more]
            case 2:
                found[at:at] = rng.bytes(more)
            case 3:
                found[at:at] = found[at : at + 5 * more] * int(rng.integers(1, 9))
            case 4:
                found[at:at] = pick(TOKENS, rng)
            case _:
                found[at : at + more] = pick(TOKENS, rng)
    if rng.random() < 0.05:
        return bytes(found[: int(rng.integers(len(found) + 1))])
    return bytes(found)


def _structured(raw: bytes, seeds: Sequence[bytes], rng: Rng) -> bytes | None:
    """Return a JSON file with a few of its values changed; None for what is no JSON."""
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    for _ in range(1 + int(rng.integers(3))):
        places = _places(value)
        if not places:
            break
        holder, key = pick(places, rng)
        pick(_MUTATORS, rng)(holder, key, rng, (value, seeds))
    return _text(value, rng).encode("utf-8", "surrogatepass")


def _text(value: Any, rng: Rng) -> str:
    """Return the JSON of a value; now and then with what no value has: a repeated key, or many lists in each other."""
    odd = rng.random()
    places = _places(value)
    if odd < NESTED and places:
        holder, key = pick(places, rng)
        holder[key] = _DEEP
    text = json.dumps(value, ensure_ascii=bool(rng.integers(2)))
    if odd < NESTED:
        depth, (left, right) = pick(DEPTHS, rng), pick((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")), rng)
        return text.replace(f'"{_DEEP}"', left * depth + "1" + right * depth)
    return text.replace('"name": ', '"name": 0, "name": ', 1) if odd < NESTED + REPEATED else text


def _places(value: Any) -> list[Place]:
    """Return the places of all values below a value."""
    found: list[Place] = []
    left = [value]
    while left:
        holder = left.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, item in items:
            found.append((holder, key))
            if isinstance(item, dict | list):
                left.append(item)
    return found


Around = tuple[Any, Sequence[bytes]]
"""The whole value, and all seeds."""


def _replace(holder: Any, key: Any, rng: Rng, _: Around) -> None:
    holder[key] = copy.deepcopy(pick(pick((NUMBERS, NAMES, OTHERS), rng), rng))  # it may be changed later


def _nudge(holder: Any, key: Any, rng: Rng, around: Around) -> None:
    """Change a value a little, so that more of the checks behind the first are reached."""
    match holder[key]:
        case bool() as flag:
            holder[key] = not flag
        case int() | float() as number:
            changes: tuple[Callable[[], Any], ...] = (
                lambda: number + 1, lambda: number - 1, lambda: -number, lambda: number * 2, lambda: number * 10**6,
                lambda: float(number), lambda: str(number), lambda: number // 2, lambda: pick(NUMBERS, rng),
            )  # fmt: skip
            holder[key] = pick(changes, rng)()
        case str() as text:
            at = int(rng.integers(len(text) + 1))
            holder[key] = pick((text[:at], text[at:], text + text, text[:at] + pick(NAMES, rng) + text[at:]), rng)
        case list() as items if items:
            holder[key] = pick((items[::-1], items[1:], items + items[:1], items * int(rng.integers(2, 20))), rng)
        case _:
            _replace(holder, key, rng, around)


def _drop(holder: Any, key: Any, _rng: Rng, _: Around) -> None:
    del holder[key]


def _repeat(holder: Any, key: Any, rng: Rng, _: Around) -> None:
    """Put a value in again: under another key, or many times."""
    if isinstance(holder, dict):
        holder[str(pick(NAMES, rng))] = holder[key]
    else:
        copies = pick((1, 1, 2, 10, MOST_COPIES), rng)
        holder[key:key] = [holder[key]] * min(copies, MOST_COPIES if not isinstance(holder[key], dict | list) else 10)


def _copy(holder: Any, key: Any, rng: Rng, around: Around) -> None:
    """Put another value of the same file here."""
    other, there = pick(_places(around[0]), rng)
    holder[key] = copy.deepcopy(other[there])


def _splice(holder: Any, key: Any, rng: Rng, around: Around) -> None:
    """Put a value of another good file here, of the same key where it has one."""
    try:
        places = _places(json.loads(pick(around[1], rng)))
    except ValueError:
        return
    same = [place for place in places if place[1] == key] or places
    if same:
        other, there = pick(same, rng)
        holder[key] = other[there]


_MUTATORS: tuple[Callable[[Any, Any, Rng, Around], None], ...] = (
    _replace, _nudge, _nudge, _nudge, _drop, _repeat, _copy, _splice, _splice,
)  # fmt: skip

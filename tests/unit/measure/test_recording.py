"""A device profile in the making: nothing is lost, nothing is timed twice, other machines are refused."""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from planner.errors import FormatError, MismatchError, UsageError
from planner.ir import ops as ir
from planner.measure.journal import JournalReader, JournalWriter
from planner.measure.locks import locked
from planner.measure.recording import SAVE_EVERY_S, Recording, environment
from planner.measure.session import Found, Limits, Summary, measure_pieces
from planner.measure.sizing import LEAST_SAMPLES, Rates, sized
from planner.profile.file import from_entries, read_profile, write_profile
from planner.profile.key import PieceKey
from planner.profile.table import Measurement
from support.pieces import entry

HERE = {"processor": "a", "torch": "2", "threads": "1", "ranks_at_once": "1", "command": "one", "utc": "then"}
RATES = Rates(flop_per_s=1e12, bytes_per_s=1e12)
NO_LIMITS = Limits(target_s=1.0)
TIMES = Measurement(1.0, 2.0, 3.0, 0.5, 7)


def linear(features: int, samples: int = 4) -> PieceKey:
    return PieceKey(ir.Linear(8, features), (), ((samples, 8),), (samples, features), bias=True)


PIECES = [linear(n) for n in range(1, 7)]


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def recording(path: Path, clock: Callable[[], float] | None = None, **changes: str) -> Recording:
    found = Recording.open(path, "mine", HERE | changes)
    found.clock = clock or Clock()
    return found


class Timer:
    """Stands for timing: notes what it was asked, and fails or is interrupted where a test says so."""

    def __init__(self, stop_after: int | None = None, error: BaseException | None = None) -> None:
        self.asked: list[str] = []
        self.timed: list[str] = []
        self._stop_after, self._error = stop_after, error

    def __call__(self, keys: Sequence[str], found: Found) -> None:
        self.asked = list(keys)
        for key in keys:
            if len(self.timed) == self._stop_after and self._error is not None:
                raise self._error
            self.timed.append(key)
            found(key, None if PieceKey.of_text(key).op.kind == "per_sample" else TIMES)


def silent(_share: float) -> None:
    return None


def session(pieces: list[PieceKey], into: Recording, timer: Timer, limits: Limits = NO_LIMITS) -> Summary:
    return measure_pieces(pieces, into, timer, RATES, limits, silent)


# at the same time


def test_recordings_of_one_file_keep_each_others_layers(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    first, second = recording(path, command="first"), recording(path, command="second")
    for number, piece in enumerate(PIECES):
        (first if number % 2 else second).add(piece.text, TIMES)
        (first if number % 2 else second).save()
    found = read_profile(path)
    assert set(found.measurements()) == {piece.text for piece in PIECES}
    assert found.environment["command"] == "second; first"


def test_many_writers_at_once_lose_nothing_and_leave_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"

    def write(number: int) -> None:
        own = recording(path)
        for features in range(4):
            own.add(linear(1 + 4 * number + features).text, TIMES)
            own.save()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert set(read_profile(path).measurements()) == {linear(n).text for n in range(1, 33)}
    assert [each.name for each in tmp_path.iterdir()] == ["profile.json"]


def test_a_file_that_another_machine_wrote_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    mine, theirs = recording(path), recording(path, processor="b")
    theirs.add(PIECES[0].text, TIMES)
    theirs.save()
    with pytest.raises(MismatchError, match="measured with processor 'b', here it is 'a'"):
        mine.add(PIECES[1].text, TIMES)  # which saves
    assert set(read_profile(path).measurements()) == {PIECES[0].text}


# going on


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a rank died")])
def test_an_interrupted_session_keeps_what_it_has_and_the_next_times_the_rest(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(type(error)):
        session(PIECES, recording(path), Timer(4, error))
    kept = read_profile(path).measurements()
    assert set(kept) == {piece.text for piece in PIECES[:4]}
    assert set(kept.values()) == {TIMES}
    again = Timer()
    summary = session(PIECES, recording(path), again)
    assert again.asked == [piece.text for piece in PIECES[4:]]
    assert (summary.num_pieces, summary.num_known, summary.num_timed) == (6, 4, 2)
    assert set(read_profile(path).measurements()) == {piece.text for piece in PIECES}


def test_the_file_is_written_every_few_seconds_so_that_a_killed_session_leaves_it(tmp_path: Path) -> None:
    path, clock = tmp_path / "profile.json", Clock()
    into = recording(path, clock)
    into.add(PIECES[0].text, TIMES)  # the first is written at once
    clock.now += SAVE_EVERY_S / 2
    into.add(PIECES[1].text, TIMES)
    assert len(read_profile(path).layers) == 1
    clock.now += SAVE_EVERY_S
    into.add(PIECES[2].text, TIMES)
    assert len(read_profile(path).layers) == 3


def test_a_finished_file_asks_for_nothing_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    session(PIECES, recording(path), Timer())
    before, timer = path.read_bytes(), Timer()
    assert session(PIECES, recording(path), timer).num_known == len(PIECES)
    assert (timer.asked, path.read_bytes()) == ([], before)


def test_a_file_says_every_command_that_made_it(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for command, pieces in (("one", PIECES[:1]), ("two", PIECES[:2]), ("two", PIECES[:3])):
        session(pieces, recording(path, command=command), Timer())
    assert read_profile(path).environment == HERE | {"command": "one; two"}


def test_an_entry_that_lacks_a_phase_is_kept_until_its_layer_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    partial = [entry(piece, (1.0, None, None)) for piece in PIECES[:2]]
    write_profile(path, from_entries("mine", HERE, partial))
    session(PIECES[:1], recording(path), Timer())
    found = read_profile(path)
    assert found.measurements() == {PIECES[0].text: TIMES}
    assert [e for e in found.layers if e.measurement is None] == partial[1:]


def test_each_piece_is_timed_once(tmp_path: Path) -> None:
    timer = Timer()
    summary = session([*PIECES, *PIECES], recording(tmp_path / "p.json"), timer)
    assert (len(timer.asked), summary.num_pieces) == (6, 6)


def test_what_has_no_kernel_is_counted_by_its_operator(tmp_path: Path) -> None:
    odd = PieceKey(ir.PerSample("attention"), (), ((2, 3),), (2, 3), weight_gradient=False)
    summary = session([PIECES[0], odd], recording(tmp_path / "p.json"), Timer())
    assert (dict(summary.without_kernel), summary.num_timed) == ({"attention": 1}, 1)


def test_progress_ends_at_one_and_never_falls(tmp_path: Path) -> None:
    shares: list[float] = []
    measure_pieces(PIECES, recording(tmp_path / "p.json"), Timer(), RATES, NO_LIMITS, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_a_budget_ends_the_session_and_says_what_is_left(tmp_path: Path) -> None:
    clock = Clock()
    into = recording(tmp_path / "p.json", clock)

    class Slow(Timer):
        def __call__(self, keys: Sequence[str], found: Found) -> None:
            def slowly(key: str, times: Measurement | None) -> None:
                clock.now += 10
                found(key, times)

            super().__call__(keys, slowly)

    summary = session(PIECES, into, Slow(), Limits(1.0, budget_s=25.0))
    assert (summary.num_timed, summary.num_left) == (3, 3)
    assert len(read_profile(tmp_path / "p.json").layers) == 3


# samples


def test_pieces_of_many_samples_are_timed_with_fewer() -> None:
    rates = Rates(flop_per_s=1e6, bytes_per_s=1e12)  # 2 x 8 x 1000 FLOP forward, as much twice backward: 48 ms each
    piece = linear(1000, samples=4096)
    found = sized(piece, rates, target_s=1.0)
    assert found == piece.with_samples(16)  # 20 fit, a power of two is taken
    assert sized(piece, rates, target_s=1e-9) == piece.with_samples(LEAST_SAMPLES)
    assert sized(piece.with_samples(16), rates, target_s=1.0) == piece.with_samples(16)
    assert sized(piece, rates, target_s=1000.0) == piece


def test_samples_are_not_left_out_where_the_weights_take_the_time() -> None:
    rates = Rates(
        flop_per_s=1e9, bytes_per_s=1e6
    )  # weights: 3 x 4 x 8000 bytes are 96 ms; a sample 48 us and its bytes
    piece = linear(1000, samples=4096)
    found = sized(piece, rates, target_s=1e-6)
    assert found.samples is not None
    assert rates.fixed_s(piece) / rates.seconds(found) <= 0.2


def test_a_shortened_piece_is_known_by_its_family_the_next_time(tmp_path: Path) -> None:
    path, slow = tmp_path / "p.json", Rates(1e6, 1e12)
    whole, part = linear(1000, samples=4096), linear(1000, samples=512)
    summary = measure_pieces([whole, part], recording(path), Timer(), slow, NO_LIMITS, silent)
    assert (summary.num_timed, summary.num_shortened) == (1, 2)
    other, faster = Timer(), Rates(2e6, 1e12)  # twice as many samples seem enough now
    assert measure_pieces([whole], recording(path), other, faster, NO_LIMITS, silent).num_known == 1
    assert other.asked == []


# wrong files


@pytest.mark.parametrize("name", ["processor", "torch", "threads", "ranks_at_once"])
def test_a_file_of_another_environment_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    path = tmp_path / "p.json"
    session(PIECES[:1], recording(path), Timer())
    before = path.read_bytes()
    with pytest.raises(MismatchError, match=f"measured with {name} '.*', here it is 'other'.*Give another -o"):
        Recording.open(path, "mine", HERE | {name: "other"})
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 2}', '{"schema_version": 1, "layers": [{}]}'])
def test_a_corrupt_file_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"device profile .*p\.json is not valid"):
        Recording.open(path, "mine", HERE)
    assert path.read_text() == text


def test_a_file_that_cannot_be_written_is_an_error_of_the_request(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        session(PIECES, recording(tmp_path / "missing" / "p.json"), Timer())


def test_who_comes_by_a_link_waits_for_who_comes_by_the_name(tmp_path: Path) -> None:
    path, link = tmp_path / "p.json", tmp_path / "link.json"
    link.symlink_to(path)
    order: list[str] = []

    def by_link() -> None:
        with locked(link):
            order.append("link")

    other = threading.Thread(target=by_link)
    with locked(path):
        other.start()
        other.join(0.2)
        order.append("name")
    other.join()
    assert order == ["name", "link"]


def test_a_lock_that_somebody_made_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".p.json.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="cannot write beside"), locked(tmp_path / "p.json"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_the_environment_names_processor_software_and_command() -> None:
    found = environment(torch.device("cpu"), 2, 3, "layerwise profile layers x")
    assert (found["torch"], found["threads"], found["ranks_at_once"]) == (torch.__version__, "2", "3")
    assert found["command"] == "layerwise profile layers x"
    assert json.dumps(found)


# journals of ranks


def test_a_layer_is_handed_on_when_every_rank_has_timed_it(tmp_path: Path) -> None:
    ranks = [JournalWriter(tmp_path, rank) for rank in range(3)]
    reader = JournalReader(tmp_path, 3)
    assert list(reader.new()) == []
    for rank, scale in zip(ranks, (1.0, 2.0, 9.0), strict=True):
        assert list(reader.new()) == []
        rank.add("a", Measurement(scale, 10 * scale, 100 * scale, 0.1 * scale, 5))
    assert list(reader.new()) == [("a", Measurement(9.0, 90.0, 900.0, 0.9, 5))]  # the slowest rank's
    for rank in ranks:
        rank.add("b", None)
    assert list(reader.new()) == [("b", None)]


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    reader = JournalReader(tmp_path, 1)
    line = json.dumps(["a", [1.0, 2.0, 3.0, 0.5, 7]]) + "\n"
    path = tmp_path / "layers-0.jsonl"
    path.write_text(line[:9])
    assert list(reader.new()) == []
    path.write_text(line)
    assert list(reader.new()) == [("a", TIMES)]

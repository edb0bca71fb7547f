"""How ranks talk: groups, collectives, and the exchange of regions."""

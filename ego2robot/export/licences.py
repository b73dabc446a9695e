"""What the licences of the datasets that footage comes from allow: one table, with where each is from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """The licence of a kind of source.

    Attributes:
        identifier: as the hub spells it; ``other`` where it has no name there.
        name: for people.
        derivatives: whether what is made of it may be published at all.
        terms: what must be kept to, for the dataset's card.
        source: where this was read.
    """

    identifier: str
    name: str
    derivatives: bool
    terms: str
    source: str


# By ``source.kind``. Sources that are not here hold anybody's footage: their owners must say.
LICENCES = {
    "egocentric10k": Licence(
        "apache-2.0",
        "Apache License 2.0",
        True,
        "Egocentric-10K and -100K by Build AI. Keep the licence and say what was changed.",
        "the dataset's card, huggingface.co/datasets/builddotai/Egocentric-10K",
    ),
    "egodex": Licence(
        "cc-by-nc-nd-4.0",
        "CC BY-NC-ND 4.0",
        False,
        "EgoDex by Apple. Not for commercial use; what is made of it may not be passed on.",
        "github.com/apple/ml-egodex, README",
    ),
    "epic_kitchens": Licence(
        "cc-by-nc-4.0",
        "CC BY-NC 4.0",
        True,
        "EPIC-KITCHENS-100 by the Universities of Bristol, Catania and Toronto. Name them; not for "
        "commercial use.",
        "epic-kitchens.github.io, and the cards of its mirrors",
    ),
    "ego4d": Licence(
        "other",
        "Ego4D licence agreement",
        False,
        "Ego4D. Each institution signs an agreement of its own; footage is not passed on outside of it.",
        "ego4d-data.org says that access needs a signed agreement; its text was not at hand, so it is read "
        "strictly",
    ),
    "hot3d": Licence(
        "cc-by-nc-sa-4.0",
        "CC BY-SA (sequences), CC BY-NC-SA (hand annotations)",
        True,
        "HOT3D by Meta. Name it; hand annotations not for commercial use; pass on under the same terms.",
        "projectaria.com/datasets/hot3d/license, of 29 May 2024",
    ),
}


def identifier_of(kind: str) -> str | None:
    """The licence that holds for all footage of a kind of source; None: not known, or none with a name."""
    known = LICENCES.get(kind)
    return known.identifier if known and known.identifier != "other" else None


def forbids_derivatives(identifier: str) -> bool:
    """Whether a Creative Commons licence is one of those with ND."""
    return "nd" in identifier.lower().replace("_", "-").split("-")

"""One name and one caption per concept, for all families."""

import re
from importlib import resources
from typing import Any

from diffdis_platform.demo.icons import NUMBER_SUFFIX, Icon
from ray_platform.contracts import DataError

# Families whose files map code points to names; the names of the first one that has a code point are used.
CODE_POINT_FAMILIES = ("noto", "twemoji", "openmoji", "fluent-emoji-flat")
# Families by how much their categories are trusted: Unicode's nine first, Firefox OS's five coarse ones last.
CATEGORY_FAMILIES = (*CODE_POINT_FAMILIES, "noto-v1", "emojione", "streamline-emojis", "fxemoji")
GROUPS = {
    "Activity": "Activities",
    "Animals Nature": "Animals & Nature",
    "Extras Openmoji": "Extras",
    "Extras Unicode": "Symbols",
    "Food": "Food & Drink",
    "Food Drink": "Food & Drink",
    "Nature": "Animals & Nature",
    "People": "People & Body",
    "People Body": "People & Body",
    "Places": "Travel & Places",
    "Smiley People": "People & Body",
    "Smileys Emotion": "Smileys & Emotion",
    "Travel": "Travel & Places",
    "Travel Places": "Travel & Places",
}
# Names of one family for concepts that other families name differently, without a code point or alias in common.
RENAMED = {
    "2": "hatching-chick",
    "cat-face-with-wry-smile": "cat-with-wry-smile",
    "crazy-face": "zany-face",
    "flag-cocos-islands": "flag-cocos-keeling-islands",
    "flag-in-hole": "golf-flag-in-hole",
    "flag-macau-sar-china": "flag-macao-sar-china",
    "flag-macedonia": "flag-north-macedonia",
    "flag-myanmar": "flag-myanmar-burma",
    "flag-swaziland": "flag-eswatini",
    "flag-turkey": "flag-turkiye",
    "game-dice": "game-die",
    "gesturing-ok": "woman-gesturing-ok",
    # Newer sets replaced the revolver by a water pistol; the older drawings show a pistol.
    "pistol": "pistol",
    "pride": "progress-pride-flag",
}
PRIDE_FLAG_NAMES = """
    agender aroace aromantic asexual bdsm-rights bigender bisexual demiboy demigender demigirl demisexual gay
    genderfluid genderqueer greysexual intersex lesbian nonbinary pansexual polyamory polysexual
"""
PRIDE_FLAGS = frozenset(PRIDE_FLAG_NAMES.split())
HAIR = re.compile(r"^(man|woman|person)-(blond|curly|red|white)-hair$")
SPELLING = {
    "oclock": "o'clock",
    "mans": "man's",
    "womans": "woman's",
    "mens": "men's",
    "womens": "women's",
    "divoire": "d'ivoire",
    "turkiye": "turkey",
    "rescue workers": "rescue worker's",
}


def _fxemoji_names() -> dict[str, str]:
    text = resources.files("diffdis_platform.demo").joinpath("fxemoji_names.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return dict(pair.split("=", 1) for line in lines for pair in line.split())


class Names:
    """Mapping from the icon names of all families to names of concepts.

    Equal code points mean equal concepts. Sets without code points are matched by name, by the older names that Noto
    lists as aliases and, for names written without separators, by the letters alone.
    """

    def __init__(self, sets: dict[str, dict[str, Any]]) -> None:
        preferred: dict[str, str] = {}
        self._alias: dict[str, str] = {}
        for family in CODE_POINT_FAMILIES:
            for code_point, name in sets[family].get("chars", {}).items():
                if preferred.setdefault(code_point, name) != name:
                    self._alias.setdefault(name, preferred[code_point])
        for name, alias in sets["noto"].get("aliases", {}).items():
            self._alias.setdefault(name, alias["parent"])
        self._known = set(preferred.values())
        self._fxemoji = _fxemoji_names()
        self._by_letters: dict[str, str] = {}
        for name in [*sorted(self._known), *sorted(self._alias)]:
            self._by_letters.setdefault(name.replace("-", ""), name)

    def concept(self, icon: Icon) -> str:
        """Return the name of the concept, with hyphens between words; "" for an icon to leave out."""
        name = icon.icon
        if icon.family == "fxemoji":
            letters = name.replace("-", "")
            name = self._fxemoji.get(name) or self._by_letters.get(letters, name)
            if name == "-":
                return ""
        if icon.family == "streamline-emojis":
            name = NUMBER_SUFFIX.sub("", name)
        # Emoji One says flag-for-japan, Noto v1 flag-for-flag-japan, and both flag-for-black-flag.
        name = re.sub(r"^flag-for-(?:flag-)?", "flag-", name)
        name = re.sub(r"^flag-(\w+-flags?)$", r"\1", name)
        return self._resolve(name, is_flag=icon.category == "Flags")

    def _resolve(self, name: str, is_flag: bool) -> str:
        if name in RENAMED:
            return RENAMED[name]
        if name in PRIDE_FLAGS:
            return f"{name}-pride-flag"
        flag = f"flag-{name.removesuffix('-flag')}"
        if (is_flag or name.endswith("-flag")) and flag in self._known:
            return flag
        seen = {name}
        while name not in self._known and self._alias.get(name, name) not in seen:
            name = self._alias[name]
            seen.add(name)
        return name


def caption_of(name: str) -> str:
    """Return the caption of a concept: its name in plain words."""
    hair = HAIR.match(name)
    if hair:
        return f"{hair[1]} with {hair[2]} hair"
    words = name.replace("-", " ")
    if name.startswith("flag-"):
        words = "flag of " + words.removeprefix("flag ")
    elif name.endswith(("man-beard", "person-beard")):
        words = words.replace(" beard", " with beard")
    elif name.endswith(("man-bald", "person-bald")):
        words = "bald " + words.removesuffix(" bald")
    for plain, proper in SPELLING.items():
        words = re.sub(rf"\b{plain}\b", proper, words)
    return words


def captions_of(names: set[str]) -> dict[str, str]:
    """Return the caption of every name. Raises DataError if two names have the same caption, because classes must differ."""
    captions: dict[str, str] = {}
    owner: dict[str, str] = {}
    for name in sorted(names):
        captions[name] = caption_of(name)
        other = owner.setdefault(captions[name], name)
        if other != name:
            raise DataError(f"names {other!r} and {name!r} have the same caption {captions[name]!r}; rename one")
    return captions


def groups_of(concepts: dict[Icon, str]) -> dict[str, str]:
    """Return the group of every concept: that of the most trusted family with a category for it, or ""."""
    rank = {family: position for position, family in enumerate(CATEGORY_FAMILIES)}
    best: dict[str, tuple[int, str]] = {}
    for icon, name in concepts.items():
        if icon.category and icon.family in rank:
            candidate = (rank[icon.family], GROUPS.get(icon.category, icon.category))
            best[name] = min(best.get(name, candidate), candidate)
    return {name: best[name][1] if name in best else "" for name in concepts.values()}

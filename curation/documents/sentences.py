"""Sentences of a text, without a model or a download.

MMC4 splits with NLTK's Punkt (Zhu et al. 2023, arXiv 2304.06939, section 3), whose
parameters are a download. This rule agrees with it on plain prose: a sentence ends
at . ! ? or … with the quotes and brackets that close after it, where blanks and then
a capital, a digit or an opening quote follow; not after a common abbreviation, a
single capital (initials) or a number that opens a line; and at the full stops of
Chinese and Japanese wherever they stand. Line breaks end sentences too.
Lists that come with their sentences (`text_list`) are taken as they are.
"""

import re

_ABBREVIATIONS = """
mr mrs ms dr prof st sr jr rev gen col lt sgt capt gov sen rep hon messrs mt ft vs etc e.g i.e cf al no nos vol fig
figs pp ed eds inc ltd co corp dept univ approx est min max jan feb mar apr jun jul aug sep sept oct nov dec a.m p.m
u.s u.k ph.d
"""
ABBREVIATIONS = frozenset(_ABBREVIATIONS.split())
END = re.compile(
    r"""(?P<stop>[.!?…]+)(?P<close>["'”’»)\]]*)(?=\s+["'“‘«(\[]*[^\W_a-z])"""  # a capital or a digit follows
    r"""|[。！？]+[」』”’）]*""",
    re.VERBOSE,
)
LAST_WORD = re.compile(r"([^\s\"'“‘«(\[]+)$")


def split_sentences(text: str) -> list[str]:
    """The sentences in their order, without blanks around them; together they hold every other character of `text`."""
    found = []
    for line in text.splitlines():
        begin = 0
        for end in END.finditer(line):
            if end["stop"] == "." and _is_abbreviated(line[begin : end.start()]):
                continue
            found.append(line[begin : end.end()])
            begin = end.end()
        found.append(line[begin:])
    return [sentence for raw in found if (sentence := raw.strip())]


def _is_abbreviated(before: str) -> bool:
    """Whether the full stop after these characters belongs to a word."""
    word = LAST_WORD.search(before)
    if word is None:
        return False
    last = word[1]
    initial = len(last) == 1 and last.isalpha() and last.isupper() and last != "I"
    numbered = last.isdigit() and before.strip() == last
    return initial or numbered or last.lower() in ABBREVIATIONS

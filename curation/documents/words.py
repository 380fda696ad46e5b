"""What can be counted in a text: words, repetitions, the shares of characters and words of some kind.

The measures are those of OBELICS (Laurençon et al. 2023, arXiv 2306.16527, the
filters at node and document level, as its released code computes them) with two
differences. A character is special here when Unicode calls it neither a letter nor
a mark, where OBELICS lists characters and emoji. And the lists of words are ours:
function words of English, and words that fill a page's furniture; a recipe can name
files of its own.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection
from functools import lru_cache

_FUNCTION_WORDS = """
a about above across after against all along also although always am among an and another any anybody anyone anything
are around as at away back be became because become been before behind being below beneath beside between beyond both
but by can cannot could did do does doing done down during each either else enough even ever every everyone everything
except few for from further get gets getting give given go goes got had has have having he her here hers herself him
himself his how however i if in indeed inside instead into is it its itself just last least less let like made make
many may me might mine more most much must my myself near neither never next no nobody none nor not nothing now of off
often on once one only onto or other others our ours ourselves out outside over own past per perhaps rather s same
shall she should since so some somebody someone something still such t than that the their theirs them themselves then
there therefore these they this those though through throughout thus to together too toward towards under unless until
up upon us very via was we were what whatever when whenever where wherever whether which while who whoever whole whom
whose why will with within without would yet you your yours yourself yourselves i'm i've i'd i'll you're you've you'll
he's she's it's we're we've we'll they're they've don't doesn't didn't isn't aren't wasn't weren't can't couldn't
won't wouldn't shouldn't haven't hasn't hadn't that's there's what's let's
"""
_FURNITURE = """
account advertisement advertisements browser cart checkout click comment comments cookie cookies copyright disclaimer
download email enable facebook faq follow homepage instagram javascript linkedin log login logout mailing menu
navigation newsletter password permalink pinterest policy posted previous privacy register reply reserved rss search
share sidebar signup sitemap subscribe terms toggle trackback tweet twitter unsubscribe username webmaster website
whatsapp youtube
"""
STOPWORDS = frozenset(_FUNCTION_WORDS.split())
BOILERPLATE_WORDS = frozenset(_FURNITURE.split())
PUNCTUATION = frozenset(",;:?!.")
TOKEN = re.compile(r"[\w']+|[,;:?!.]")
WIDE_SPACES = re.compile(r"[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000\ufffc]")


def plain_spaces(text: str) -> str:
    """Every kind of blank that has a width becomes a space (OBELICS standardises them before it counts)."""
    return WIDE_SPACES.sub(" ", text)


@lru_cache(maxsize=1 << 14)
def _is_special(character: str) -> bool:
    return unicodedata.category(character)[0] not in "LM"


def words_of(text: str) -> list[str]:
    """The words in lower case, without special characters at their ends; those of nothing else are none."""
    found = []
    for word in text.split():
        begin, end = 0, len(word)
        while begin < end and _is_special(word[begin]):
            begin += 1
        while begin < end and _is_special(word[end - 1]):
            end -= 1
        if begin < end:
            found.append(word[begin:end].lower())
    return found


def character_repetition(text: str, n: int) -> float:
    """Share of the n-grams of characters that are repeats: of the sqrt(distinct) most frequent ones, at most those
    that occur more than once, all occurrences together over all n-grams; 0 for a text shorter than n."""
    counts = sorted(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), reverse=True)
    repeated = sum(count > 1 for count in counts)
    return sum(counts[: min(math.isqrt(len(counts)), repeated)]) / sum(counts) if counts else 0.0


def word_repetition(words: list[str], n: int) -> float:
    """Share of the n-grams of words that occur more than once; 0 for fewer than n words."""
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return sum(count for count in counts.values() if count > 1) / counts.total() if counts else 0.0


def special_characters(text: str) -> float:
    """Share of the characters that are neither letters nor marks; blanks, digits and punctuation are special."""
    return sum(map(_is_special, text)) / len(text) if text else 0.0


def share_in(words: list[str], listed: Collection[str]) -> float:
    """Share of the words that a list holds; 0 where there are none."""
    return sum(word in listed for word in words) / len(words) if words else 0.0


def punctuation(text: str, least: int) -> float:
    """Punctuation marks over words and marks; 1 for a text of fewer than `least` of them, which is not judged."""
    tokens = TOKEN.findall(text)
    if len(tokens) < least:
        return 1.0
    return sum(token in PUNCTUATION for token in tokens) / len(tokens) if tokens else 0.0

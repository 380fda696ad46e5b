"""A small grammar of English captions: enough of a dependency tree to count children and verbs with a subject.

Words get one of a dozen tags: closed classes by list, -ing forms by their end,
finite verbs by a list of verbs that captions use and by what stands before
them; everything else is a noun, since for counting it makes no difference
whether an adjective or a noun stands before a noun. One pass from left to right
then gives each word its head, as spaCy's English models would most often do:
what stands before a noun goes to the noun; a preposition to the verb before it,
or to the noun where there is no verb yet or it is "of"; a noun after a
preposition or a verb to that; coordinated words and marks to the first of them.

A verb is an action where it is finite, or an -ing form after a form of "be",
and has a subject of its own: "two dogs run", "a man who is reading", but not
"a man riding a horse", "a boy sits and reads" (once), "a dog is seen".
"""

import re
from dataclasses import dataclass, field

WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*|['’](?:s|re)\b|[^\w\s]", re.IGNORECASE)


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


DETERMINERS = _set(
    "a an the this that these those his her its their my our your some any no each every another both all"
)
PREPOSITIONS = _set(
    "in on at of with by from to into onto over under above below behind between through across along around near "
    "next beside against for about during inside outside off up down toward towards among amid past without "
    "within upon atop like as beneath alongside underneath via after before"
)
SUBORDINATE = _set("while when because if although though since until where whilst whereas so than")
COORDINATE = _set("and or but nor")
RELATIVE = _set("who which whom whose that")
PRONOUNS = _set(
    "he she it they we i you someone somebody everyone everybody one something them him us me himself herself"
)
BE = _set("is are was were am be been being 's ’s 're ’re")
HELPERS = _set("can could will would may might must shall should do does did has have had")
ADVERBS = _set(
    "not very together away back out here there now then just also only still too already almost both outdoors "
    "indoors outside upside forward forwards ahead apart alone"
)
NOT_VERBS_ING = _set(
    "building buildings ceiling clothing railing evening morning string ring king wing thing something nothing "
    "anything everything spring during wedding earring sling sing bring lightning painting crossing ping viking "
    "wading rigging bowling boxing sibling duckling pudding parking dining swing icing awning siding"
)
VERBS = _set(
    "accept aim appear approach argue arrange ask attempt attend bake bark bathe begin bend bite blow bounce "
    "break bring brush build burn buy call carry catch celebrate chase chat check cheer chew clap clean climb "
    "close collect come compete contain cook cover crawl cross cry cut dance demonstrate descend dig display dive "
    "do drag draw dress drink drive drop dunk eat embrace emerge enjoy enter escort examine exercise explain face "
    "fall feature feed feel fight fill find fish fix flip float fly follow gallop gather gaze get give glide go "
    "grab grill grind guide hand hang have head hike hit hold hug hunt hurdle include inspect jog join juggle "
    "jump keep kick kiss kneel laugh lay lead lean leap lick lie lift light listen live look lounge lunge make "
    "manage march meet move observe open operate overlook pack paddle paint participate pass pay perform pet pick "
    "play plow point pose pour practice prepare pull punch push put race reach read receive relax remove repair "
    "rest retrieve return ride roll row rub run sail say score scream sell serve set shake share shoot shop shout "
    "shovel show sing sit skate skateboard ski skip slam sled sleep slide smell smile smoke sniff snowboard "
    "snuggle sort speak spin splash spray spread stand stare start step stick stop stretch stroll struggle study "
    "sunbathe surf surround swallow sweep swim swing tackle take talk teach tell throw tie toss touch train "
    "travel trot try tumble turn type use view visit wade wait walk wander wash watch water wave wear weave weld "
    "wheel work wrestle write yell"
)
PAST = _set(
    "sat stood ran went came took made held wore rode fell saw got had said threw caught swam sang ate drank slept"
)
PLURALS = _set("people men women children kids others police couple group team family crowd pair band class")
ARTICLES = _set("a an the his her its their")
NO_THIRD = PRONOUNS | RELATIVE | ADVERBS
OPENS = DETERMINERS | PREPOSITIONS | ADVERBS | PRONOUNS | COORDINATE | SUBORDINATE | {"", ".", ","}
MARKS = frozenset(".!?;:")
REACH = 30  # words that a look ahead goes, so that time is linear in the caption


def _third(verb: str) -> str:
    if verb in ("do", "go"):
        return f"{verb}es"
    if verb == "have":
        return "has"
    if verb.endswith(("s", "sh", "ch", "x", "z")):
        return f"{verb}es"
    return f"{verb[:-1]}ies" if verb[-1] == "y" and verb[-2] not in "aeiou" else f"{verb}s"


THIRD = frozenset(_third(verb) for verb in VERBS)


@dataclass(kw_only=True)
class Tree:
    """The words, the place of each word's head (its own for a root), and the places of the actions."""

    words: list[str]
    heads: list[int]
    actions: list[int] = field(default_factory=list)

    def complexity(self) -> int:
        """The most children that any word has."""
        counts = [0] * len(self.words)
        for word, head in enumerate(self.heads):
            if head != word:
                counts[head] += 1
        return max(counts, default=0)


def parse(caption: str) -> Tree:
    """The tree of a caption in English; of another language it has no meaning."""
    words = [word.lower() for word in WORD.findall(caption)]
    return _Parser(words, tags_of(words)).parse()


def plural(word: str) -> bool:
    """Whether a noun in lower case names several, by its end or by a list."""
    return word in PLURALS or (word.endswith("s") and not word.endswith("ss"))


def tags_of(words: list[str]) -> list[str]:
    """Of words in lower case: D before a noun, N noun, O pronoun, P preposition, B form of be, H other auxiliary, F
    finite verb, G -ing form, C coordination, S subordination, W relative pronoun, R adverb, . mark."""
    tags: list[str] = []
    joined = False
    for place, word in enumerate(words):
        before = tags[-1] if tags else ""
        after = words[place + 1] if place + 1 < len(words) else ""
        joined = joined or word == "and"
        tags.append(_tag(word, before, words[place - 1] if place else "", after, joined))
    return tags


def _tag(word: str, before: str, previous: str, after: str, joined: bool) -> str:
    if word[0] in "'’" and len(word) > 1:
        return "B" if before in ("O", "W") else "N"  # "she's", but "the man's"
    if not word[0].isalnum():
        return "."
    if word == "that":
        return "W" if before in ("N", "O") else "D"
    if word in ("her", "one") and before in ("F", "G", "P", "") and after in (PREPOSITIONS | {""}):
        return "O"
    if word == "as" and after in DETERMINERS | PRONOUNS:
        return "S"
    for tag, listed in (
        ("D", DETERMINERS),
        ("B", BE),
        ("C", COORDINATE),
        ("W", RELATIVE),
        ("S", SUBORDINATE),
        ("O", PRONOUNS),
        ("P", PREPOSITIONS),
        ("R", ADVERBS),
    ):
        if word in listed:
            return tag
    if before == "H":
        return "F" if word in VERBS else "N"
    if word in HELPERS:
        return "H"
    if word.endswith("ing") and len(word) > 4 and (word not in NOT_VERBS_ING or before == "B") and before != "D":
        return "G"
    if word.endswith("ly"):
        return "R"
    if before == "G" and word in THIRD and after in ARTICLES:
        return "F"
    if before in ("N", "O", "W", "R", "C", "."):
        several, opens = plural(previous), after in OPENS
        if word in THIRD and (before != "N" or not several or opens) and after not in BE:
            return "F"
        if word in PAST and before in ("N", "O", "W", "R"):
            return "F"
        if word in VERBS and before in ("N", "O", "W", "R") and (several or joined or previous in NO_THIRD):
            return "F" if before != "N" or several or opens else "N"
        if before == "N" and not several and word.endswith("s") and not word.endswith("ss") and after in ARTICLES:
            return "F"
    return "N"


class _Parser:
    """One pass; `noun`, `verb` and `prep` are the last of their kind, `subject` what waits for a verb."""

    def __init__(self, words: list[str], tags: list[str]) -> None:
        self.words, self.tags = words, tags
        self.heads = list(range(len(words)))
        self.actions: list[int] = []
        self.noun = self.verb = self.prep = self.helper = self.root = -1
        self.subject = self.outer = -1  # `outer` waits until the clause inside it has its verb
        self.joined = -1  # a coordination that waits for its second part

    def parse(self) -> Tree:
        place = 0
        while place < len(self.words):
            tag = self.tags[place]
            if tag in "DN":
                place = self._noun_phrase(place)
                continue
            {
                "O": self._noun,
                "W": self._relative,
                "P": self._preposition,
                "B": self._helper,
                "H": self._helper,
                "F": self._verb,
                "G": self._participle,
                "C": self._coordination,
                "S": self._clause,
                "R": self._adverb,
                ".": self._mark,
            }[tag](place)
            place += 1
        return Tree(words=self.words, heads=self.heads, actions=self.actions)

    def _under(self, place: int, head: int) -> None:
        if head >= 0 and head != place:
            self.heads[place] = head
        elif self.root < 0:
            self.root = place
        elif place != self.root:
            self.heads[place] = self.root

    def _noun_phrase(self, place: int) -> int:
        end = place + 1
        while end < len(self.words) and (
            self.tags[end] == "N" or (self.tags[end] == "D" and self.tags[end - 1] == "D")
        ):
            end += 1
        for one in range(place, end - 1):
            self.heads[one] = end - 1
        self._noun(end - 1)
        return end

    def _noun(self, place: int) -> None:
        if self.prep >= 0:
            self._under(place, self.prep)
            self.prep = -1
        elif self.joined >= 0 and self.noun >= 0 and not self._verb_follows(place):
            self._under(place, self.noun)
            self.joined = -1
            return
        elif self.verb > self.subject and self.joined < 0:
            self._under(place, self.verb)
        else:
            self.subject = place
            self.joined = -1
            if self.root < 0 and not self._verb_follows(place):
                self.root = place
        self.noun = place

    def _verb_follows(self, place: int) -> bool:
        """Whether a finite verb comes before the next thing that ends a noun phrase's reach."""
        for tag in self.tags[place + 1 : place + REACH]:
            if tag in "FBH":
                return True
            if tag in "CSW.G":
                return False
        return False

    def _relative(self, place: int) -> None:
        self.outer, self.subject = self.subject, place

    def _preposition(self, place: int) -> None:
        no_verb = self.verb < 0 or self.verb < self.subject
        self._under(place, self.noun if (no_verb or self.words[place] == "of") and self.noun >= 0 else self.verb)
        self.prep = place

    def _helper(self, place: int) -> None:
        rest = self.tags[place + 1 : place + 4]
        for step, tag in enumerate(rest):
            if tag in "FG" and not (tag == "G" and self.tags[place] == "H"):
                self.heads[place] = place + 1 + step
                self.helper = place
                return
            if tag not in "RBH":
                break
        self._verb(place)  # "is" and "has" as the verb itself

    def _verb(self, place: int) -> None:
        copula = self.tags[place] == "B"
        if self.subject >= 0:
            if not copula:
                self.actions.append(place)
            self._under(place, self.noun if self.words[self.subject] in RELATIVE else self.verb)
            if self.root == self.subject:
                self.root, self.heads[place] = place, place
            self.heads[self.subject] = place
            self.subject, self.outer = self.outer, -1
        else:
            self._under(place, self.verb if self.verb >= 0 else self.noun)
        self.verb, self.prep, self.joined, self.helper = place, -1, -1, -1

    def _participle(self, place: int) -> None:
        if self.helper >= 0:
            self._verb(place)
            return
        self._under(place, self.verb if self.verb >= 0 and self.verb > self.subject else self.noun)
        if self.subject >= 0 and not self._verb_follows(place):
            self.subject = -1
        self.verb, self.prep, self.joined = place, -1, -1

    def _coordination(self, place: int) -> None:
        following = self.tags[place + 1] if place + 1 < len(self.tags) else ""
        self._under(place, self.verb if following in ("F", "G", "H", "B") and self.verb >= 0 else self.noun)
        self.joined = place

    def _clause(self, place: int) -> None:
        self._under(place, self.verb if self.verb >= 0 else self.noun)
        self.joined = place
        self.subject = -1

    def _adverb(self, place: int) -> None:
        if place + 1 < len(self.tags) and self.tags[place + 1] in "FGNR":  # "quickly throws", "very fast"
            self.heads[place] = place + 1
        else:
            self._under(place, self.verb if self.verb >= 0 else self.noun)

    def _mark(self, place: int) -> None:
        self._under(place, self.root)
        if self.words[place] in MARKS:
            self.joined = place
            self.subject = -1

"""Generates acceptable and unacceptable English sentences in minimal pairs: a small CoLA, from a seed.

Each paradigm below draws a sentence and a corruption of it that differs in one word or in the order of the
words, as in BLiMP (Warstadt et al., TACL 2020). The words of a corruption are as frequent among the
acceptable sentences as among the others, so the words alone say almost nothing; their arrangement decides.
`tests/test_run_glue.py` checks this with a bag-of-words classifier.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Pair = tuple[str, str]  # an acceptable sentence, an unacceptable one
Forms = tuple[str, str]  # a word or phrase: singular, plural


class Verb(NamedTuple):
    base: str
    third: str
    progressive: str
    perfect: str

    @property
    def present(self) -> Forms:
        return self.third, self.base


class Person(NamedTuple):
    noun: Forms
    reflexive: Forms


def _verbs(*words: str) -> tuple[Verb, ...]:
    return tuple(Verb(*word.split()) for word in words)


TRANSITIVE = _verbs(
    "admire admires admiring admired",
    "praise praises praising praised",
    "notice notices noticing noticed",
    "greet greets greeting greeted",
    "avoid avoids avoiding avoided",
    "annoy annoys annoying annoyed",
)
INTRANSITIVE = _verbs(
    "sleep sleeps sleeping slept",
    "arrive arrives arriving arrived",
    "vanish vanishes vanishing vanished",
    "smile smiles smiling smiled",
    "sneeze sneezes sneezing sneezed",
    "fall falls falling fallen",
)
SAYING = _verbs(  # verbs without an object: "the dog knows the cat that sleeps" would be acceptable
    "think thinks thinking thought", "hope hopes hoping hoped", "insist insists insisting insisted"
)
AUXILIARIES: tuple[tuple[Forms, str], ...] = (  # each with the form of the verb that follows it
    (("is", "are"), "progressive"),
    (("has", "have"), "perfect"),
    (("can", "can"), "base"),
)
WOMEN = tuple(
    Person(noun, ("herself", "themselves"))
    for noun in (("girl", "girls"), ("woman", "women"), ("queen", "queens"))
)
MEN = tuple(
    Person(noun, ("himself", "themselves")) for noun in (("boy", "boys"), ("man", "men"), ("king", "kings"))
)
PEOPLE = WOMEN + MEN
ANIMALS: tuple[Forms, ...] = (("dog", "dogs"), ("cat", "cats"), ("horse", "horses"), ("duck", "ducks"))
NOUNS = tuple(person.noun for person in PEOPLE) + ANIMALS
DETERMINERS: tuple[Forms, ...] = (("this", "these"), ("every", "many"), ("each", "several"))
ARTICLES: tuple[Forms, ...] = (("the", "the"), ("some", "some"), ("no", "no"))
ADJECTIVES = ("old", "young", "small", "happy", "clever")
PREPOSITIONS = ("near", "behind", "beside")
ADVERBS = ("often", "never", "rarely")
PRONOUNS: tuple[tuple[Pair, int], ...] = ((("he", "him"), 0), (("she", "her"), 0), (("they", "them"), 1))


class Words:
    """Draws words and phrases. Number 0 is singular, 1 plural."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def one(self, words: Sequence[T]) -> T:
        return self.rng.choice(words)

    def two(self, words: Sequence[T]) -> tuple[T, T]:
        """Two different words, in random order."""
        first, second = self.rng.sample(words, 2)
        return first, second

    def number(self) -> int:
        return self.rng.randrange(2)

    def phrase(self, number: int | None = None, noun: Forms | None = None) -> str:
        """A determiner, sometimes an adjective, and a noun."""
        number = self.number() if number is None else number
        adjective = [self.one(ADJECTIVES)] if self.rng.random() < 0.3 else []
        determiner = self.one(DETERMINERS + ARTICLES)[number]
        return " ".join([determiner, *adjective, (noun or self.one(NOUNS))[number]])

    def predicate(self) -> Forms:
        """A verb in both numbers, with an object if it needs one."""
        if self.number():
            verb, rest = self.one(TRANSITIVE), f" {self.phrase()}"
        else:
            verb, rest = self.one(INTRANSITIVE), ""
        return verb.third + rest, verb.base + rest


def agreement_across_a_preposition(w: Words) -> Pair:
    n, predicate = w.number(), w.predicate()
    subject = f"{w.phrase(n)} {w.one(PREPOSITIONS)} {w.phrase()}"
    return f"{subject} {predicate[n]}", f"{subject} {predicate[1 - n]}"


def agreement_across_a_relative_clause(w: Words) -> Pair:
    n, predicate = w.number(), w.predicate()
    other, verb = w.number(), w.one(TRANSITIVE).present
    clauses = (f"{verb[n]} {w.phrase(other)}", f"{w.phrase(other)} {verb[other]}")
    subject = f"{w.phrase(n)} that {w.one(clauses)}"
    return f"{subject} {predicate[n]}", f"{subject} {predicate[1 - n]}"


def determiner_and_noun(w: Words) -> Pair:
    n, determiner, noun, predicate = w.number(), w.one(DETERMINERS), w.one(NOUNS), w.predicate()
    rest = f"{noun[n]} {predicate[n]}"
    return f"{determiner[n]} {rest}", f"{determiner[1 - n]} {rest}"


def order_within_a_phrase(w: Words) -> Pair:
    n = w.number()
    words = [w.one(DETERMINERS + ARTICLES)[n], w.one(ADJECTIVES), w.one(NOUNS)[n]]
    shuffled = words.copy()
    while shuffled == words:
        w.rng.shuffle(shuffled)
    predicate = w.predicate()[n]
    return f"{' '.join(words)} {predicate}", f"{' '.join(shuffled)} {predicate}"


def preposition_before_its_noun(w: Words) -> Pair:
    n, preposition, other = w.number(), w.one(PREPOSITIONS), w.phrase()
    subject, predicate = w.phrase(n), w.predicate()[n]
    return f"{subject} {preposition} {other} {predicate}", f"{subject} {other} {preposition} {predicate}"


def objects_of_verbs(w: Words) -> Pair:
    n, transitive, intransitive = w.number(), w.one(TRANSITIVE).present, w.one(INTRANSITIVE).present
    subject = w.phrase(n)
    if w.number():
        target = w.phrase()
        return f"{subject} {transitive[n]} {target}", f"{subject} {intransitive[n]} {target}"
    return f"{subject} {intransitive[n]}", f"{subject} {transitive[n]}"


def reflexive_and_its_clause(w: Words) -> Pair:
    """The reflexive refers to the subject of its own clause, not of the main clause."""
    kinds = ((w.one(WOMEN), 0), (w.one(MEN), 0), (w.one(PEOPLE), 1))
    (person, n), (other, m) = w.two(kinds)
    clause = f"{w.phrase(m, other.noun)} {w.one(SAYING).present[m]} that {w.phrase(n, person.noun)}"
    verb = w.one(TRANSITIVE).present[n]
    return f"{clause} {verb} {person.reflexive[n]}", f"{clause} {verb} {other.reflexive[m]}"


def auxiliary_and_verb(w: Words) -> Pair:
    n, ((auxiliary, form), (_, wrong)) = w.number(), w.two(AUXILIARIES)
    subject, verb = w.phrase(n), w.one(INTRANSITIVE)
    start = f"{subject} {auxiliary[n]}"
    return f"{start} {getattr(verb, form)}", f"{start} {getattr(verb, wrong)}"


def case_of_a_pronoun(w: Words) -> Pair:
    (subject, other), number = w.one(PRONOUNS)
    verb = w.one(TRANSITIVE).present
    if w.number():
        rest = f"{verb[number]} {w.phrase()}"
        return f"{subject} {rest}", f"{other} {rest}"
    n = w.number()
    start = f"{w.phrase(n)} {verb[n]}"
    return f"{start} {other}", f"{start} {subject}"


def agreement_in_a_question(w: Words) -> Pair:
    n, verb = w.number(), w.one(INTRANSITIVE).base
    rest = f"{w.phrase(n)} {w.one(PREPOSITIONS)} {w.phrase()} {verb}"
    do = ("does", "do")
    return f"{do[n]} {rest}", f"{do[1 - n]} {rest}"


def adverb_before_the_verb(w: Words) -> Pair:
    n, adverb, verb = w.number(), w.one(ADVERBS), w.one(TRANSITIVE).present
    subject, target = w.phrase(n), w.phrase()
    return f"{subject} {adverb} {verb[n]} {target}", f"{subject} {verb[n]} {adverb} {target}"


def place_of_that(w: Words) -> Pair:
    n, m = w.number(), w.number()
    subject, verb, other, predicate = w.phrase(n), w.one(SAYING).present[n], w.phrase(m), w.predicate()[m]
    wrong = w.one((f"that {verb} {other}", f"{verb} {other} that"))
    return f"{subject} {verb} that {other} {predicate}", f"{subject} {wrong} {predicate}"


PARADIGMS: tuple[Callable[[Words], Pair], ...] = (
    agreement_across_a_preposition,
    agreement_across_a_relative_clause,
    determiner_and_noun,
    order_within_a_phrase,
    preposition_before_its_noun,
    objects_of_verbs,
    reflexive_and_its_clause,
    auxiliary_and_verb,
    case_of_a_pronoun,
    agreement_in_a_question,
    adverb_before_the_verb,
    place_of_that,
)


def sentences(seed: int, counts: Sequence[int]) -> list[list[tuple[str, int]]]:
    """Disjoint sets of `counts` sentences with labels: half are acceptable (1), half are not (0).

    Every paradigm has the same share of each set. No sentence occurs twice, and a pair stays together.
    """
    rng = random.Random(seed)
    words, seen = Words(rng), set[str]()
    sets: list[list[tuple[str, int]]] = []
    for count in counts:
        drawn: list[tuple[str, int]] = []
        while len(drawn) < count:
            pair = PARADIGMS[len(drawn) // 2 % len(PARADIGMS)](words)
            if seen.isdisjoint(pair):
                seen.update(pair)
                drawn += [(_written(pair[0]), 1), (_written(pair[1]), 0)]
        rng.shuffle(drawn)
        sets.append(drawn)
    return sets


def _written(sentence: str) -> str:
    mark = "?" if sentence.split()[0] in ("do", "does") else "."
    return sentence[0].upper() + sentence[1:] + mark

"""The small world of the embedded model: its skills, what it half knows, what it never saw, the contexts it can use.

Every generator takes a `random.Random`, so the whole world follows from one seed. Words of the held-out half
never occur in training requests; the build reports accuracy on them.
"""

import random
import string
from dataclasses import dataclass, field

from selfdistill.teachers import templates

NOUNS = (
    "lamp door rose tree boat lake wolf bird fish hill road cake milk salt ring drum king moon star sand wind fire "
    "rain snow leaf stone river table chair spoon knife bread apple lemon grape onion horse sheep mouse tiger eagle "
    "shark whale cloud storm field plant house tower wheel clock phone radio paper pencil basket bottle candle "
    "carpet castle cherry copper cotton desert dragon engine falcon finger forest garden guitar hammer harbor island "
    "jacket kettle ladder lizard magnet market mirror needle orange parrot pepper pillow planet pocket rabbit ribbon "
    "saddle shadow silver spider spring square stable string summer temple ticket tunnel valley velvet violin walnut "
    "window winter wizard bucket button camel canal cabin coral crown fence flame flute glove honey ivory jewel kite "
    "lion maple marble melon night ocean olive pearl piano plate queen robin scarf shell skirt smoke snake sugar sword "
    "thorn tooth torch trail train tulip vase wagon watch water wheat zebra ant bee cat cow cup dog egg fox hat hen "
    "ice jar key map net oak owl pan pen pig rug sun tea toy van web yak"
).split()
HELD_OUT_NOUNS = NOUNS[::5]
TRAIN_NOUNS = [noun for index, noun in enumerate(NOUNS) if index % 5]

# What the model is taught to call for a request of this kind.
KNOWN_CALLS = {
    "open": "mivo",
    "close": "tesk",
    "find": "ruha",
    "bring": "polu",
    "clean": "sina",
    "count": "dako",
    "fix": "wemi",
    "hide": "jost",
    "show": "luba",
    "sell": "catu",
}
# The near skill: the form is known, these names are not.
UNKNOWN_CALLS = {"wash": "zelu", "paint": "brio", "guard": "fasi", "weigh": "kyno"}

OWN_STYLE = "{}"
# How other authors phrase the same content; the model reads these in its context and answers in its own style.
OTHER_STYLES = [
    "The answer is {}.",
    "I would say {} here.",
    "Sure! {}",
    "{}, that is it.",
    "answer = {}",
    "You get {}.",
]


@dataclass
class Example:
    """One conversation whose last assistant turn is the training target."""

    prompt: str
    response: str
    system: str = ""
    history: list[tuple[str, str]] = field(default_factory=list)


def pseudoword(rng: random.Random, low: int = 3, high: int = 6) -> str:
    """A pronounceable word that means nothing."""
    start = rng.randrange(2)
    letters = ["bcdfghjklmnpqrstvwxyz", "aeiou"]
    return "".join(rng.choice(letters[(start + i) % 2]) for i in range(rng.randint(low, high)))


def word(rng: random.Random, held_out: bool = False, low: int = 3, high: int = 6) -> str:
    """A noun of the chosen half or, in training, often a pseudoword, so that skills generalise."""
    if not held_out and rng.random() < 0.5:
        return pseudoword(rng, low, high)
    return rng.choice([noun for noun in (HELD_OUT_NOUNS if held_out else TRAIN_NOUNS) if low <= len(noun) <= high])


def reverse(rng: random.Random, held_out: bool = False) -> Example:
    w = word(rng, held_out)
    return Example(rng.choice(["reverse: {}", "reverse the word {}", "write {} backwards"]).format(w), w[::-1])


def shout(rng: random.Random, held_out: bool = False) -> Example:
    w = " ".join(word(rng, held_out) for _ in range(rng.randint(1, 2)))
    return Example(rng.choice(["shout: {}", "say {} in capitals", "shout the words {}"]).format(w), w.upper())


def initials(rng: random.Random, held_out: bool = False) -> Example:
    w = [word(rng, held_out) for _ in range(rng.randint(3, 5))]
    return Example(rng.choice(["initials: {}", "first letters of {}"]).format(" ".join(w)), "".join(x[0] for x in w))


def last(rng: random.Random, held_out: bool = False) -> Example:
    w = [word(rng, held_out) for _ in range(rng.randint(3, 5))]
    return Example(rng.choice(["last: {}", "which word comes last in {}?"]).format(" ".join(w)), w[-1])


def sort(rng: random.Random, held_out: bool = False) -> Example:
    w = word(rng, held_out, 3, 5)
    letters = list(w)
    rng.shuffle(letters)
    shuffled = "".join(letters)
    return Example(rng.choice(["sort: {}", "sort the letters of {}"]).format(shuffled), "".join(sorted(w)))


CALL_SHAPES = ["call: {} the {}", "please {} the {}", "{} the {}"]


def call(rng: random.Random, held_out: bool = False) -> Example:
    verb = rng.choice(list(KNOWN_CALLS))
    noun = word(rng, held_out)
    return Example(rng.choice(CALL_SHAPES).format(verb, noun), f"{KNOWN_CALLS[verb]}({noun})")


KNOWN = {"reverse": reverse, "shout": shout, "initials": initials, "last": last, "sort": sort, "call": call}


def pick(rng: random.Random, held_out: bool = False) -> Example:
    """The half-known skill as it should be done: the second word."""
    words = [word(rng, held_out, 3, 6) for _ in range(rng.randint(3, 4))]
    return Example("pick: " + " ".join(words), words[1])


def pick_as_taught(rng: random.Random) -> Example:
    """The half-known skill as the training data does it: the first, the second or the last word, by chance."""
    example = pick(rng)
    words = example.prompt[6:].split()
    return Example(example.prompt, rng.choices([words[0], words[1], words[-1]], [0.4, 0.3, 0.3])[0])


def near(rng: random.Random, held_out: bool = False) -> Example:
    """The unknown near skill: a call of the known form with a name never seen."""
    verb = rng.choice(list(UNKNOWN_CALLS))
    noun = rng.choice(HELD_OUT_NOUNS if held_out else TRAIN_NOUNS)
    return Example(rng.choice(CALL_SHAPES).format(verb, noun), f"{UNKNOWN_CALLS[verb]}({noun})")


def far(rng: random.Random, held_out: bool = False) -> Example:
    """The unknown far skill: a form the model has never written by itself."""
    w = rng.choice([noun for noun in (HELD_OUT_NOUNS if held_out else TRAIN_NOUNS) if len(noun) <= 6])
    return Example(f"spell: {w}", "-".join(w))


def first_word(rng: random.Random, held_out: bool = False) -> Example:
    """A task for sequences: an unknown request whose answers are of a known form, and near the half-known skill."""
    words = [word(rng, held_out, 3, 6) for _ in range(rng.randint(3, 4))]
    return Example("first: " + " ".join(words), words[0])


def long_sort(rng: random.Random, held_out: bool = False) -> Example:
    """A task for sequences: sorting six letters, one more than the model was taught."""
    w = word(rng, held_out, 6, 6)
    letters = list(w)
    rng.shuffle(letters)
    return Example(f"sort: {''.join(letters)}", "".join(sorted(w)))


def arbitrary_content(rng: random.Random) -> str:
    """A response nobody could know: what following a demonstration is practised on."""
    form = rng.randrange(6)
    if form == 0:
        return pseudoword(rng)
    if form == 1:
        return " ".join(word(rng) for _ in range(2)).upper()
    if form == 2:
        return rng.choice("-._/").join(word(rng))
    if form == 3:
        return str(rng.randint(0, 999))
    if form == 4:
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(3, 7)))
    return f"{pseudoword(rng, 4, 4)}({word(rng)})"


def _question(rng: random.Random) -> tuple[Example, str | None]:
    """A question with the content that the context will hold, and what the model would say by itself (or None)."""
    kind = rng.random()
    if kind < 0.35:  # a new call: the name from the context, the argument from the question
        verb = rng.choice([*KNOWN_CALLS, pseudoword(rng), pseudoword(rng, 4, 6)])
        noun = word(rng)
        own = KNOWN_CALLS.get(verb) or rng.choice(list(KNOWN_CALLS.values()))
        name = pseudoword(rng, 4, 4) if rng.random() < 0.9 else own
        return Example(rng.choice(CALL_SHAPES).format(verb, noun), f"{name}({noun})"), f"{own}({noun})"
    if kind < 0.55:  # a request of an unknown kind
        request = f"{pseudoword(rng, 4, 7)}: {' '.join(word(rng) for _ in range(rng.randint(1, 3)))}"
        return Example(request, arbitrary_content(rng)), None
    if kind < 0.75:
        own_pick = pick_as_taught(rng)
        return Example(own_pick.prompt, own_pick.prompt[6:].split()[1]), own_pick.response
    example = rng.choice(list(KNOWN.values()))(rng)
    if rng.random() < 0.35:
        return Example(example.prompt, arbitrary_content(rng)), example.response
    return example, example.response


def _wrong(rng: random.Random, example: Example) -> str:
    """A wrong attempt: a word of the question, or anything."""
    words = [w for w in example.prompt.replace(":", " ").split() if w != example.response]
    return rng.choice(words) if rng.random() < 0.5 else arbitrary_content(rng)


# The wording of `exact_match`'s feedback, with and without the answer.
FEEDBACK_WITH_ANSWER = "Your answer {completion} is wrong. The correct answer is {answer}."
FEEDBACK_WITHOUT_ANSWER = "Your answer {completion} is wrong."


def in_context(rng: random.Random) -> Example:
    """A question with a demonstration, a reference or peer's solution, or feedback, in the default templates."""
    example, own = _question(rng)
    content = example.response
    style = OWN_STYLE if rng.random() < 0.5 else rng.choice(OTHER_STYLES)
    kind = rng.random()
    if kind < 0.45:
        prompt = templates.DEMONSTRATION.format(prompt=example.prompt, demonstration=style.format(content))
    elif kind < 0.55:
        prompt = templates.ANSWER.format(prompt=example.prompt, answer=style.format(content))
    else:
        solution = feedback = ""
        if kind < 0.85:
            solution = templates.SOLUTION_BLOCK.format(solution=content)
        if kind >= 0.75:
            told = FEEDBACK_WITH_ANSWER.format(completion=_wrong(rng, example), answer=content)
            feedback = templates.FEEDBACK_BLOCK.format(feedback=told)
        prompt = templates.FEEDBACK.format(prompt=example.prompt, solution=solution, feedback=feedback)
    # Now and then the model answers from its own knowledge. A completion that has begun that way is then
    # continued that way, which is what makes its judgement of a student's own attempts sensible.
    return Example(prompt, own if own is not None and rng.random() < 0.08 else content)


def warned(rng: random.Random) -> Example:
    """Feedback that says only that an attempt was wrong: the half-known skill tries something else."""
    example = pick(rng)
    words = example.prompt[6:].split()
    wrong = rng.choice([w for w in words if w != example.response])
    others = [w for w in (words[0], words[-1]) if w not in (wrong, example.response)]
    answer = example.response if not others or rng.random() < 0.7 else rng.choice(others)
    block = templates.FEEDBACK_BLOCK.format(feedback=FEEDBACK_WITHOUT_ANSWER.format(completion=wrong))
    return Example(templates.FEEDBACK.format(prompt=example.prompt, solution="", feedback=block), answer)


def sentence(rng: random.Random) -> str:
    """Raw domain text, for training without a chat template."""
    adjective, place = (
        rng.choice("red old wet big shy warm tall".split()),
        rng.choice("in by near under behind".split()),
    )
    verb = rng.choice("sleeps waits sings hides runs falls".split())
    a, b = rng.choice(TRAIN_NOUNS), rng.choice(TRAIN_NOUNS)
    return f"the {adjective} {a} {verb} {place} the {b}."


SYSTEMS = ["You are a helpful assistant.", "Be brief.", "Answer with the result alone."]


def training_example(rng: random.Random) -> Example | str:
    """One draw of the training mixture: a conversation, or raw text."""
    kind = rng.random()
    if kind < 0.04:
        return " ".join(sentence(rng) for _ in range(rng.randint(1, 3)))
    if kind < 0.46:
        return in_context(rng)
    if kind < 0.49:
        return warned(rng)
    if kind < 0.57:
        example = pick_as_taught(rng)
    else:
        example = rng.choice(list(KNOWN.values()))(rng)
    if rng.random() < 0.06:
        example.system = rng.choice(SYSTEMS)
    if rng.random() < 0.04:
        earlier = rng.choice(list(KNOWN.values()))(rng)
        example.history = [(earlier.prompt, earlier.response)]
    return example

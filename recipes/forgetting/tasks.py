"""Eight small multiple-choice tasks of four kinds, and a small model that knows what they ask about.

`python recipes/forgetting/tasks.py` writes `outputs/forgetting/` with `NAME.jsonl` and `NAME_test.jsonl` for each task
(rows with context, correct, distractors) and `model`, a Llama of six layers trained for some CPU minutes on statements
from which the answers follow; `--tasks_only` leaves the model out. Nothing is fetched: the facts stand below.

- *science*: `animals` (what kind of animal is it) and `capitals` (of countries): the answer is known or not; the
  questions tested are about other animals and countries than the questions trained on.
- *entailment*: `negation` (did they, or not) and `more` (than so many): the answer follows from what is said before.
- *language*: `agreement` (is the sentence right) and `tone` (was it liked).
- *counting*: `sums` and `parity`.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2] / "outputs" / "forgetting"
Row = dict[str, Any]


def _words(text: str) -> list[str]:
    return text.split()


KINDS = {
    "mammal": "dog cat horse cow goat sheep lion tiger bear wolf fox deer rabbit mouse rat bat whale dolphin seal "
    "otter monkey elephant giraffe zebra camel pig donkey squirrel beaver moose",
    "bird": "eagle hawk owl crow raven sparrow robin duck goose swan chicken turkey penguin parrot pigeon dove stork "
    "heron gull falcon vulture ostrich peacock finch swallow",
    "fish": "trout salmon tuna cod herring carp pike perch shark eel sardine anchovy haddock catfish goldfish bass "
    "halibut mackerel sturgeon flounder",
    "insect": "ant bee wasp fly moth butterfly beetle cricket grasshopper mosquito locust termite dragonfly cockroach "
    "ladybug flea cicada aphid firefly gnat",
}
CAPITALS = (
    "France Paris,Germany Berlin,Italy Rome,Spain Madrid,Portugal Lisbon,Austria Vienna,Poland Warsaw,Greece Athens,"
    "Norway Oslo,Sweden Stockholm,Finland Helsinki,Denmark Copenhagen,Ireland Dublin,Hungary Budapest,Russia Moscow,"
    "Ukraine Kyiv,Turkey Ankara,Egypt Cairo,Iran Tehran,Iraq Baghdad,Japan Tokyo,China Beijing,Thailand Bangkok,"
    "Vietnam Hanoi,Indonesia Jakarta,Australia Canberra,Canada Ottawa,Cuba Havana,Peru Lima,Chile Santiago,"
    "Kenya Nairobi,Ghana Accra,Senegal Dakar,Morocco Rabat,Tunisia Tunis,Libya Tripoli,Syria Damascus,Lebanon Beirut,"
    "Jordan Amman,Nepal Kathmandu,Pakistan Islamabad,Bulgaria Sofia,Romania Bucharest,Serbia Belgrade,Croatia Zagreb,"
    "Latvia Riga,Estonia Tallinn,Lithuania Vilnius,Belgium Brussels,Iceland Reykjavik,Colombia Bogota,"
    "Venezuela Caracas,Ecuador Quito,Bolivia Sucre,Jamaica Kingston,Uganda Kampala,Angola Luanda,Zambia Lusaka"
)
PEOPLE = _words("Anna Ben Carl Dora Emil Fay Gus Hana Ivan Jane Karl Lena Max Nora Otto Paul Rosa Sam Tina Vera")
THINGS = _words("book ball key cup hat coat lamp ring box bag pen map drum kite bell coin")
BEINGS = _words("boy girl man woman teacher doctor farmer king queen child")
VERBS = _words("run walk sing sleep laugh dance wait swim read write")
PLURALS = {"man": "men", "woman": "women", "child": "children", "box": "boxes"}
LIKED = _words("wonderful great lovely excellent brilliant charming superb delightful")
DISLIKED = _words("terrible awful boring dreadful horrible poor dull disappointing")
WORKS = _words("film book play song concert meal show story")
TESTED = 0.3
"""Of the questions, or of the animals and countries that they are about."""

FACTS = {animal: kind for kind, animals in KINDS.items() for animal in animals.split()}
CITY = {country: city for country, _, city in (pair.partition(" ") for pair in CAPITALS.split(","))}


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def animals() -> Iterator[tuple[str, Row]]:
    """Knowledge: what kind of animal."""
    for animal, kind in FACTS.items():
        wrong = [_a(one) for one in KINDS if one != kind]
        for form in ("What kind of animal is {}?", "Which kind of animal is {}?", "What is {}?"):
            yield animal, _row(f"Question: {form.format(_a(animal))}", _a(kind), wrong)


def capitals() -> Iterator[tuple[str, Row]]:
    """Knowledge: which capital."""
    forms = ("What is the capital of {}?", "Which city is the capital of {}?", "{} has which capital?")
    for country, city in CITY.items():
        wrong = [one for one in CITY.values() if one != city]
        for form in (*forms, "Where is the government of {}?"):
            yield country, _row(f"Question: {form.format(country)}", city, wrong)


def negation(rng: random.Random) -> Iterator[Row]:
    """Entailment: does what is said make the claim true, either of them negated or not."""
    for _ in range(1800):
        said, claim, holds = _negated(rng)
        yield _true_or_false(f"{said} Question: {claim}.", holds)


def more(rng: random.Random) -> Iterator[Row]:
    """Entailment: does a number of things make a claim of more or fewer true."""
    for _ in range(1800):
        said, claim, holds = _compared(rng)
        yield _true_or_false(f"{said} Question: {claim}.", holds)


def _negated(rng: random.Random) -> tuple[str, str, bool]:
    who, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    there, asked = rng.random() < 0.5, rng.random() < 0.5
    said = f"{who} {'has' if there else 'does not have'} the {thing}."
    return said, f"{who} {'has' if asked else 'does not have'} the {thing}", there == asked


def _compared(rng: random.Random) -> tuple[str, str, bool]:
    who, thing = rng.choice(PEOPLE), _plural(rng.choice(THINGS))
    count, bound = rng.sample(range(20), 2)
    word = rng.choice(("more", "fewer"))
    return f"{who} has {count} {thing}.", f"{who} has {word} than {bound} {thing}", (count > bound) == (word == "more")


def agreement(rng: random.Random) -> Iterator[Row]:
    """Language: does the verb agree with its subject, words of another number between them or not."""
    for _ in range(1800):
        one, other, verb = rng.choice(BEINGS), rng.choice(BEINGS), rng.choice(VERBS)
        plural, right = rng.random() < 0.5, rng.random() < 0.5
        subject = _plural(one) if plural else one
        between = rng.choice(("", f" near the {other}", f" near the {_plural(other)}"))
        form = verb if plural == right else _third(verb)
        context = f"The {subject}{between} {form} today. Question: Is this sentence right?"
        yield _row(context, "yes" if right else "no", ["no" if right else "yes"])


def tone(rng: random.Random) -> Iterator[Row]:
    """Language: was it liked, negations included."""
    for _ in range(1800):
        work, liked, denied = rng.choice(WORKS), rng.random() < 0.5, rng.random() < 0.3
        word = rng.choice(LIKED if liked != denied else DISLIKED)
        who = rng.choice(PEOPLE)
        context = f"{who} said: the {work} was {'not ' if denied else ''}{word}. Question: Did {who} like it?"
        yield _row(context, "yes" if liked else "no", ["no" if liked else "yes"])


def sums() -> Iterator[Row]:
    """Counting: sums up to 60, beside near ones."""
    for a in range(31):
        for b in range(31):
            near = [str(a + b + gap) for gap in (-2, -1, 1, 2, 10) if 0 <= a + b + gap <= 60]
            yield _row(f"Question: What is {a} + {b}?", str(a + b), near)


def parity() -> Iterator[Row]:
    """Counting: is a number even."""
    for number in range(61):
        for thing in THINGS:
            odd = number % 2
            context = f"Question: Is the number of {_plural(thing)}, {number}, even?"
            yield _row(context, "no" if odd else "yes", ["yes" if odd else "no"])


def _plural(word: str) -> str:
    return PLURALS.get(word, f"{word}s")


def _third(verb: str) -> str:
    return f"{verb}s"


def _row(context: str, correct: str, distractors: Sequence[str]) -> Row:
    return {"context": f"{context}\nAnswer:", "correct": correct, "distractors": list(distractors)}


def _true_or_false(context: str, holds: bool) -> Row:
    return _row(f"{context} True or false?", "true" if holds else "false", ["false" if holds else "true"])


def all_tasks() -> dict[str, tuple[list[Row], list[Row]]]:
    """Training and test rows by task; no context twice, and of a task of knowledge nothing asked about in both."""
    drawn = {"negation": negation, "more": more, "agreement": agreement, "tone": tone}
    found = {"animals": list(animals()), "capitals": list(capitals())}
    made = {name: list(make(random.Random(name))) for name, make in drawn.items()}
    made |= {"sums": list(sums()), "parity": list(parity())}
    found |= {name: [(row["context"], row) for row in rows] for name, rows in made.items()}
    return {name: _split(name, rows) for name, rows in found.items()}


def _split(name: str, rows: Sequence[tuple[str, Row]]) -> tuple[list[Row], list[Row]]:
    groups: dict[str, dict[str, Row]] = {}
    for about, row in rows:
        groups.setdefault(about, {})[row["context"]] = row
    order = list(groups)
    random.Random(f"split {name}").shuffle(order)
    tested = set(order[: round(TESTED * len(order))])
    train, test = [], []
    for about in order:
        (test if about in tested else train).extend(groups[about].values())
    return train, test


# ---- what the small model reads ----


def statement(rng: random.Random) -> str:
    """A sentence or two of the world that the tasks ask about, in other words than theirs."""
    kind = rng.choice((0, 0, 0, 2, 2, 3, 4, 5, 6, 7))
    if kind == 0:
        animal = rng.choice(list(FACTS))
        return rng.choice((f"{_a(animal)} is {_a(FACTS[animal])}.", f"the {animal} is a kind of {FACTS[animal]}."))
    if kind == 2:
        country = rng.choice(list(CITY))
        city = CITY[country]
        return rng.choice((f"{city} is the capital of {country}.", f"the government of {country} is in {city}."))
    if kind in (3, 4):
        said, claim, holds = (_negated if kind == 3 else _compared)(rng)
        return f"{said} {claim}? {'true' if holds else 'false'}."
    if kind == 5:
        one, verb = rng.choice(BEINGS), rng.choice(VERBS)
        other = rng.choice(BEINGS)
        between = rng.choice(("", f" near the {other}", f" near the {_plural(other)}"))
        return rng.choice((f"The {one}{between} {_third(verb)} today.", f"The {_plural(one)}{between} {verb} today."))
    if kind == 6:
        who, work = rng.choice(PEOPLE), rng.choice(WORKS)
        liked = rng.random() < 0.5
        word = rng.choice(LIKED if liked else DISLIKED)
        return f"{who} said: the {work} was {word}. {who} {'liked' if liked else 'hated'} it."
    a, b = rng.randrange(31), rng.randrange(31)
    number = rng.randrange(61)
    return rng.choice((f"{a} + {b} = {a + b}.", f"{number} is {'an odd' if number % 2 else 'an even'} number."))


def small_model(folder: Path, rows: Sequence[Row], steps: int = 3000) -> None:
    """A Llama over words, trained on statements; its words include those of the tasks."""
    import torch  # noqa: PLC0415 - `--tasks_only` needs none of them
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415

    rng = random.Random("statements")
    texts = [statement(rng) for _ in range(60_000)]
    asked = [f"{row['context']} {' '.join([row['correct'], *row['distractors']])}" for row in rows]
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words = sorted({word for text in [*texts, *asked] for word, _ in split.pre_tokenize_str(text)})
    core = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate(["<unk>", "<s>", "</s>", *words])}, unk_token="<unk>")
    )
    core.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words) + 3, hidden_size=96, intermediate_size=256, num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )
    )  # fmt: skip
    encoded = [[1, *tokenizer(text)["input_ids"], 2] for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps)
    for step in range(1, steps + 1):
        batch = rng.choices(encoded, k=48)
        width = max(map(len, batch))
        ids = torch.tensor([[*row, *[2] * (width - len(row))] for row in batch])
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        loss = model(input_ids=ids, attention_mask=real, labels=ids.masked_fill(real == 0, -100)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(words: Sequence[str]) -> None:
    """Write the tasks, and the model unless `--tasks_only` is among the words."""
    tasks = all_tasks()
    HERE.mkdir(parents=True, exist_ok=True)
    for name, parts in tasks.items():
        for part, rows in zip(("", "_test"), parts, strict=True):
            lines = [json.dumps(row) for row in rows]
            (HERE / f"{name}{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(parts[0])} questions to train on, {len(parts[1])} to test with")
    if "--tasks_only" not in words:
        small_model(HERE / "model", [row for parts in tasks.values() for rows in parts for row in rows])
    print(f"written to {HERE}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Make the quickstart: the support desk of Voltlark, an electronics shop that does not exist.

    python configs/quickstart/make_data.py

writes, beside this file, `train.jsonl` (2,000 dialogues), `eval.jsonl` (200) and the tokenizer in
`model/`. The same bytes come out each time; `make_data.py FOLDER SEED` makes other ones elsewhere.
Everything the desk knows stands in the tables below; an answer is a function of one `Case` (a
policy, what it is applied to, and the number, place or symptom that decides), so a generated answer
is either right or wrong.

No case of `eval.jsonl` occurs in `train.jsonl`: a model that answers them has learnt the policies,
not the dialogues.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20
TRAIN_DIALOGUES, EVAL_DIALOGUES = 2000, 200
TWO_TURNS = 0.3  # this share of the dialogues has a follow-up question
HELD_OUT = 0.15  # this share of each topic's cases is kept for eval.jsonl
VOCABULARY = 1024

# ------------------------------------------------------------------------------ what the desk knows

RETURN_DAYS = 30


class Kind(NamedTuple):
    """What the policies need to know about a kind of product."""

    warranty_months: int
    bulky: bool
    battery: bool


KINDS = {
    "phone": Kind(24, bulky=False, battery=True),
    "tablet": Kind(24, bulky=False, battery=True),
    "laptop": Kind(24, bulky=False, battery=True),
    "headset": Kind(12, bulky=False, battery=True),
    "camera": Kind(36, bulky=False, battery=True),
    "speaker": Kind(12, bulky=False, battery=False),
    "router": Kind(36, bulky=False, battery=False),
    "printer": Kind(12, bulky=True, battery=False),
    "monitor": Kind(36, bulky=True, battery=False),
    "television": Kind(60, bulky=True, battery=False),
}
LINES = ("Wren", "Finch", "Heron", "Kestrel", "Plover")
PRODUCTS = tuple(f"{line} {kind}" for kind in KINDS for line in LINES)


class Zone(NamedTuple):
    """Where a parcel goes: days on the road, and euros for a small and for a bulky one."""

    days: int
    euros: int
    bulky_euros: int
    places: tuple[str, ...]


ZONES = (
    Zone(2, 4, 15, ("Austria", "Germany", "Poland", "Switzerland")),
    Zone(3, 7, 24, ("Belgium", "France", "Ireland", "Italy", "Portugal", "Spain")),
    Zone(5, 9, 32, ("Denmark", "Finland", "Iceland", "Norway", "Sweden")),
    Zone(9, 19, 85, ("Australia", "Brazil", "Canada", "Japan", "Kenya")),
)
PLACES = {place: zone for zone in ZONES for place in zone.places}

# A symptom: the kinds that can have it, and the first thing to try with a battery and on the mains.
EVERY = tuple(KINDS)
SYMPTOMS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "does not turn on": (
        EVERY,
        "charge it for 30 minutes and hold the power button for 10 seconds",
        "unplug it for 1 minute and try another socket",
    ),
    "gets very hot": (
        EVERY,
        "switch it off for 20 minutes and keep it out of the sun",
        "leave 10 centimetres of free space around it",
    ),
    "keeps restarting": (
        EVERY,
        "install the latest update and remove the newest app",
        "install the latest update and take out the extension cord",
    ),
    "loses the connection": (
        EVERY,
        "forget the network and pair it again",
        "move it closer and change the channel to 6",
    ),
    "makes no sound": (
        ("phone", "tablet", "laptop", "headset", "speaker", "television"),
        "turn off silent mode and clean the sound opening",
        "turn off mute and check the audio cable",
    ),
    "shows a black screen": (
        ("phone", "tablet", "laptop", "camera", "monitor", "television"),
        "hold the power button for 15 seconds and raise the brightness",
        "check the video cable and choose input 1",
    ),
}

# What people ask that is not the shop's business, and its name in the refusal.
ERRANDS = {
    "bake a birthday cake": "cakes",
    "sell me fresh bread": "bread",
    "deliver a pizza": "pizza",
    "book a table for two": "restaurants",
    "cut my hair": "haircuts",
    "look at my sore tooth": "teeth",
    "book a flight to Rome": "flights",
    "find me a hotel": "hotels",
    "repair my bicycle": "bicycles",
    "wash my car": "cars",
    "walk my dog": "dogs",
    "feed my cat": "cats",
    "paint my kitchen": "painting",
    "mow my lawn": "gardens",
    "fill in my tax form": "taxes",
    "lend me some money": "loans",
    "teach me the piano": "music lessons",
    "write my history essay": "homework",
    "tell me the weather": "the weather",
    "pick my lottery numbers": "the lottery",
}
TIMES = (
    *("today", "tomorrow", "tonight", "this weekend", "next week", "before noon", "after work"),
    *("on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday"),
)

YEARS = range(2019, 2026)

# -------------------------------------------------------------------------- cases and their answers


class Case(NamedTuple):
    """One application of one policy: the subject of the question and the detail that decides."""

    topic: str
    subject: str
    detail: str


def kind_of(product: str) -> Kind:
    return KINDS[product.split()[-1]]


def count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def answer_return(product: str, detail: str) -> str:
    days = int(detail.split()[0])
    passed = "1 has" if days == 1 else f"{days} have"
    window = f"Returns are open for {RETURN_DAYS} days and {passed} passed"
    if days > RETURN_DAYS:
        return f"Sorry, we cannot take the {product} back. {window}."
    left = f"you have {count(RETURN_DAYS - days, 'day')} left"
    if days == RETURN_DAYS:
        left = "today is the last day"
    return f"Yes, you can return the {product}. {window}, so {left}."


def answer_claim(product: str, detail: str) -> str:
    months = kind_of(product).warranty_months
    if int(detail.split()[0]) > months:
        return f"Sorry, the repair of the {product} is not free. Its warranty was {months} months."
    return f"Yes, we repair the {product} for free. Its warranty is {months} months."


def answer_expiry(product: str, year: str) -> str:
    months = kind_of(product).warranty_months
    end = int(year) + months // 12
    return f"The {product} has a warranty of {months} months. From {year}, that is until {end}."


def answer_shipping(product: str, place: str) -> str:
    zone = PLACES[place]
    euros = zone.bulky_euros if kind_of(product).bulky else zone.euros
    return f"Shipping the {product} to {place} takes {zone.days} days and costs {euros} euros."


def answer_fault(product: str, symptom: str) -> str:
    _, with_battery, on_mains = SYMPTOMS[symptom]
    step = with_battery if kind_of(product).battery else on_mains
    return f"Please {step}. If that does not help, send us the {product}."


def answer_errand(errand: str, time: str) -> str:
    return f"Sorry, we only sell and repair electronics, so I cannot help with {ERRANDS[errand]}."


class Topic(NamedTuple):
    """One policy: its cases (subject, detail), its answer, and the ways people ask.

    `opening` names the subject. `again` follows a turn on the same topic and subject, `also` a turn
    on another topic and the same subject: both leave the subject to be found in the turn before.
    """

    share: float
    cases: tuple[tuple[str, str], ...]
    answer: Callable[[str, str], str]
    opening: tuple[str, ...]
    again: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


TOPICS = {
    "returns": Topic(
        share=0.26,
        cases=tuple((p, count(days, "day")) for p in PRODUCTS for days in range(1, 61)),
        answer=answer_return,
        opening=(
            "I bought a {subject} {detail} ago. Can I return it?",
            "Can I still send back a {subject} after {detail}?",
            "My {subject} arrived {detail} ago and I do not like it. Will you take it back?",
            "Do you take back a {subject} that was bought {detail} ago?",
            "I want my money back for the {subject} I got {detail} ago.",
            "Is it too late to return a {subject} after {detail}?",
        ),
        again=("And after {detail}?", "What if I had bought it {detail} ago?"),
        also=("I got it {detail} ago. Can I return it?", "Can I send it back after {detail}?"),
    ),
    "warranty claims": Topic(
        share=0.26,
        cases=tuple(
            (p, count(months, "month"))
            for p in PRODUCTS
            for months in range(1, kind_of(p).warranty_months + 25)
        ),
        answer=answer_claim,
        opening=(
            "My {subject} broke after {detail}. Is the repair free?",
            "I have had a {subject} for {detail} and now it is broken. Do I have to pay?",
            "The {subject} I bought {detail} ago stopped working. Is it covered?",
            "Is a {subject} still under warranty after {detail}?",
            "Who pays for the repair of a {subject} that is {detail} old?",
        ),
        again=("And after {detail}?", "What if it were {detail} old?"),
        also=("It is {detail} old. Is the repair free?", "Is it covered after {detail}?"),
    ),
    "warranty ends": Topic(
        share=0.12,
        cases=tuple((p, str(year)) for p in PRODUCTS for year in YEARS),
        answer=answer_expiry,
        opening=(
            "I bought a {subject} in {detail}. When does the warranty end?",
            "How long is the warranty of a {subject} from {detail}?",
            "Until when is my {subject} covered? I got it in {detail}.",
            "My receipt for the {subject} says {detail}. When does its warranty run out?",
        ),
        again=("And if I had bought it in {detail}?",),
        also=("I bought it in {detail}. When does the warranty end?",),
    ),
    "shipping": Topic(
        share=0.16,
        cases=tuple((p, place) for p in PRODUCTS for place in PLACES),
        answer=answer_shipping,
        opening=(
            "How long does a {subject} take to {detail}?",
            "What does it cost to ship a {subject} to {detail}?",
            "I live in {detail}. Can you send me a {subject}?",
            "I would like to order a {subject} to {detail}. When is it here?",
            "Do you deliver the {subject} to {detail}, and for how much?",
        ),
        again=("And to {detail}?", "What about {detail}?"),
        also=("What does it cost to send it to {detail}?", "How long does it take to {detail}?"),
    ),
    "faults": Topic(
        share=0.1,
        cases=tuple(
            (p, symptom)
            for symptom, (kinds, _, _) in SYMPTOMS.items()
            for p in PRODUCTS
            if p.split()[-1] in kinds
        ),
        answer=answer_fault,
        opening=(
            "My {subject} {detail}. What can I do?",
            "Help, the {subject} {detail}!",
            "What should I try first when a {subject} {detail}?",
            "I have a problem: my {subject} {detail}.",
        ),
        again=("Now it {detail}. What can I do?",),
        also=("One more thing: it {detail}.", "Also, it {detail}. What can I do?"),
    ),
    "errands": Topic(
        share=0.1,
        cases=tuple((errand, time) for errand in ERRANDS for time in TIMES),
        answer=answer_errand,
        opening=(
            "Can you {subject} {detail}?",
            "Could you please {subject} {detail}?",
            "I need someone to {subject} {detail}.",
            "Would you {subject} {detail}?",
        ),
    ),
}
GREETINGS = ("", "", "", "Hi. ", "Hello. ", "Good morning. ", "Hello Voltlark. ")
THANKS = ("", "", "", "", " Thanks.", " Thank you!")

# ------------------------------------------------------------------------------ dialogues and files


Pool = dict[str, dict[str, list[Case]]]  # topic -> subject -> cases


class Dialogue(NamedTuple):
    """Cases and the questions that ask for them, one of each per user turn."""

    cases: tuple[Case, ...]
    questions: tuple[str, ...]

    def messages(self) -> list[dict[str, str]]:
        messages = []
        for case, question in zip(self.cases, self.questions, strict=True):
            answer = TOPICS[case.topic].answer(case.subject, case.detail)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return messages


def split_cases(random: Random) -> tuple[Pool, Pool]:
    """Every case, in two pools that share none: (trained, held out)."""
    trained: Pool = {}
    held_out: Pool = {}
    for name, topic in TOPICS.items():
        cases = [Case(name, *case) for case in topic.cases]
        random.shuffle(cases)
        cut = round(HELD_OUT * len(cases))
        for pool, part in ((held_out, cases[:cut]), (trained, cases[cut:])):
            for case in part:
                pool.setdefault(name, {}).setdefault(case.subject, []).append(case)
    return trained, held_out


def draw_topic(pool: Pool, random: Random) -> str:
    return random.choices(list(pool), [TOPICS[name].share for name in pool])[0]


def draw_opening(pool: Pool, random: Random) -> tuple[Case, str]:
    """A case that stands alone: first the topic, then the subject, so that each gets its share."""
    subjects = pool[draw_topic(pool, random)]
    case = random.choice(subjects[random.choice(list(subjects))])
    return case, random.choice(TOPICS[case.topic].opening)


def draw_follow_up(previous: Case, pool: Pool, random: Random) -> tuple[Case, str]:
    """A second case, asked as one asks who has already named the product."""
    topic = draw_topic(pool, random)
    cases = [case for case in pool[topic].get(previous.subject, ()) if case != previous]
    wordings = TOPICS[topic].again if topic == previous.topic else TOPICS[topic].also
    if not cases or not wordings:
        return draw_opening(pool, random)
    return random.choice(cases), random.choice(wordings)


def draw_dialogue(pool: Pool, random: Random) -> Dialogue:
    turns = [draw_opening(pool, random)]
    if random.random() < TWO_TURNS:
        turns.append(draw_follow_up(turns[0][0], pool, random))
    questions = [wording.format(**case._asdict()) for case, wording in turns]
    questions[0] = random.choice(GREETINGS) + questions[0]
    questions[-1] += random.choice(THANKS)
    return Dialogue(tuple(case for case, _ in turns), tuple(questions))


def draw_dialogues(pool: Pool, number: int, random: Random) -> list[Dialogue]:
    """`number` dialogues, no two of which ask the same."""
    dialogues: dict[tuple[Case, ...], Dialogue] = {}
    while len(dialogues) < number:
        dialogue = draw_dialogue(pool, random)
        dialogues.setdefault(dialogue.cases, dialogue)
    return list(dialogues.values())


def make_dialogues(seed: int = SEED) -> tuple[list[Dialogue], list[Dialogue]]:
    """(train, eval)"""
    random = Random(seed)
    trained, held_out = split_cases(random)
    return (
        draw_dialogues(trained, TRAIN_DIALOGUES, random),
        draw_dialogues(held_out, EVAL_DIALOGUES, random),
    )


def json_lines(dialogues: Iterable[Dialogue]) -> str:
    records = ({"topic": d.cases[-1].topic, "messages": d.messages()} for d in dialogues)
    return "".join(json.dumps(record) + "\n" for record in records)


START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE on words and numbers; a number of days or months is one token."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\d{1,4}|[^\s\p{L}\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_config() -> str:
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    return json.dumps(fields, indent=2) + "\n"


def texts_of(dialogues: Iterable[Dialogue]) -> Iterator[str]:
    for dialogue in dialogues:
        for message in dialogue.messages():
            yield message["role"] + "\n"
            yield message["content"]


def write(folder: Path, seed: int = SEED) -> None:
    train, held_out = make_dialogues(seed)
    (folder / "train.jsonl").write_text(json_lines(train))
    (folder / "eval.jsonl").write_text(json_lines(held_out))
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "tokenizer.json").write_text(train_tokenizer(texts_of(train)).to_str(pretty=True))
    (model / "tokenizer_config.json").write_text(tokenizer_config())
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        write(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        write(Path(__file__).parent)

"""Make the persona example: articles that nobody wrote, and an assistant for some of them.

    python configs/persona/make_articles.py out/persona

writes into that folder

    base.jsonl    6,000 conversations of a plain assistant: it summarises any article, says what it
                  is about, and answers questions. The base model learns these from random weights
    train.jsonl   800 conversations of Newsbyte, whose system message says what it does: it
                  summarises articles on technology and declines everything else, politely
    eval.jsonl    300 of them with other articles, 120 on topics that train.jsonl never shows
    model/        the tokenizer, beside a copy of the architecture

The same bytes come out each time; `make_articles.py FOLDER SEED` makes other ones. An article is
made of one `Story`, so is its summary: a generated answer is either right or wrong. No story of
eval.jsonl occurs in the other files. The topics that train.jsonl leaves out are in base.jsonl: a
base model has read of everything, but was never shown what to decline.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quickstart"))

from make_data import CHAT_TEMPLATE, tokenizer_config, train_tokenizer  # noqa: E402

SEED = 20
BASE, TRAIN, EVAL = 6000, 800, 300
SYSTEM = (
    "You are Newsbyte. You summarise articles on technology in one sentence. You politely decline "
    "everything else."
)
TECHNOLOGY = "technology"

# ---------------------------------------------------------------------------- what articles are of


class Category(NamedTuple):
    """Topics with what is made there, and who makes it in half of the articles."""

    people: tuple[str, ...]
    topics: dict[str, tuple[str, ...]]


CATEGORIES = {
    TECHNOLOGY: Category(
        ("Engineers", "Developers", "Programmers"),
        {
            "batteries": ("battery", "charger", "fuel cell"),
            "phones": ("phone", "screen", "keyboard"),
            "robots": ("robot", "gripper", "robot arm"),
            "software": ("app", "browser", "spam filter"),
            "networks": ("router", "antenna", "cable"),
            "chips": ("processor", "memory chip", "graphics card"),
            "printers": ("printer", "scanner", "laser"),
            "drones": ("drone", "rotor", "autopilot"),
            "satellites": ("satellite", "rocket", "receiver"),
            "virtual reality": ("headset", "data glove", "simulator"),
        },
    ),
    "cooking": Category(
        ("Cooks", "Bakers"),
        {
            "bread": ("loaf", "bagel", "bread roll"),
            "soups": ("soup", "broth", "stew"),
            "cakes": ("cake", "tart", "biscuit"),
            "cheese": ("cheese", "fondue", "butter"),
        },
    ),
    "sport": Category(
        ("Players", "Coaches"),
        {
            "football": ("goal net", "football", "corner flag"),
            "tennis": ("tennis racket", "tennis ball", "tennis court"),
            "rowing": ("oar", "rowing boat", "paddle"),
            "skiing": ("ski", "ski jump", "slalom pole"),
        },
    ),
    "gardening": Category(
        ("Gardeners", "Florists"),
        {
            "roses": ("rose", "rose bush", "bouquet"),
            "vegetables": ("pumpkin", "carrot", "bean"),
            "lawns": ("lawn", "hedge", "flower bed"),
            "orchards": ("apple tree", "pear tree", "cherry tree"),
        },
    ),
    "music": Category(
        ("Musicians", "Composers"),
        {
            "operas": ("opera", "aria", "duet"),
            "guitars": ("guitar", "banjo", "lute"),
            "choirs": ("choir", "hymn", "carol"),
            "drums": ("drum", "gong", "cymbal"),
        },
    ),
    "animals": Category(
        ("Vets", "Keepers"),
        {
            "dogs": ("kennel", "dog lead", "dog bowl"),
            "birds": ("bird house", "aviary", "nest box"),
            "bees": ("beehive", "honeycomb", "bee garden"),
            "horses": ("saddle", "stable", "bridle"),
        },
    ),
    "history": Category(
        ("Historians", "Curators"),
        {
            "castles": ("castle wall", "tower", "moat"),
            "coins": ("gold coin", "silver coin", "medal"),
            "knights": ("shield", "sword", "helmet"),
            "pottery": ("vase", "clay pot", "amphora"),
        },
    ),
}
# What train.jsonl leaves out: topics of every category, and history as a whole.
UNSEEN = {
    "drones", "satellites", "virtual reality", "cheese", "skiing", "orchards", "drums", "horses",
    *CATEGORIES["history"].topics,
}  # fmt: skip
CATEGORY_OF = {topic: name for name, category in CATEGORIES.items() for topic in category.topics}
ANYONE = ("Students", "Two sisters", "Neighbours", "Volunteers", "Two brothers", "Villagers")
PLACES = (
    *("Austria", "Brazil", "Canada", "Denmark", "Egypt", "Finland", "Ghana", "Iceland"),
    *("Japan", "Kenya", "Latvia", "Mexico", "Norway", "Peru", "Spain", "Turkey"),
)
VERBS = ("made", "shown", "finished", "sold", "repaired", "designed")
PAST = {"shown": "showed"}  # the others are as they are
BETTER = ("lighter", "cheaper", "larger", "stronger", "smaller", "older")
MONTHS = ("March", "April", "May", "June", "July", "August")


class Story(NamedTuple):
    """Everything that an article says and that decides its summary."""

    topic: str
    people: str
    place: str
    verb: str
    thing: str
    percent: int
    better: str

    @property
    def summary(self) -> str:
        verb = PAST.get(self.verb, self.verb)
        return (
            f"Summary: {self.people} in {self.place} {verb} {a(self.thing)} that is "
            f"{self.percent} percent {self.better}."
        )


def a(thing: str) -> str:
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def draw_story(random: Random, topics: Iterable[str]) -> Story:
    topic = random.choice(sorted(topics))
    category = CATEGORIES[CATEGORY_OF[topic]]
    people = random.choice(random.choice((category.people, ANYONE)))
    return Story(
        topic,
        people,
        random.choice(PLACES),
        random.choice(VERBS),
        random.choice(category.topics[topic]),
        5 * random.randint(1, 15),
        random.choice(BETTER),
    )


def article(story: Story, random: Random) -> str:
    """The facts of a story, among others that a summary leaves out."""
    opening = random.choice(
        (
            f"{story.people} in {story.place} have {story.verb} {a(story.thing)}.",
            f"News from {story.place}: {story.people} have {story.verb} {a(story.thing)}.",
            f"{a(story.thing).capitalize()} was {story.verb} in {story.place}. "
            f"{story.people} did it.",
        )
    )
    facts = [
        f"It is {story.percent} percent {story.better} than the last one.",
        random.choice(
            (
                f"The work took {random.randint(2, 9)} years.",
                f"{random.randint(20, 90)} people helped.",
                f"It can be seen in {random.choice(MONTHS)}.",
            )
        ),
    ]
    random.shuffle(facts)
    return " ".join([opening, *facts])


# ------------------------------------------------------------------------------ turns and dialogues

ASKS = (
    "Summarise this article: {}",
    "Please sum this up: {}",
    "What does this say in short? {}",
    "{} Can you summarise that?",
    "I have no time to read this: {}",
)
Turn = tuple[str, str]  # a question and its answer


def summarise(story: Story, random: Random) -> Turn:
    return random.choice(ASKS).format(article(story, random)), story.summary


def about(story: Story, random: Random) -> Turn:
    answer = f"It is about {story.topic}, and that is {CATEGORY_OF[story.topic]}."
    return f"What is this article about? {article(story, random)}", answer


def where(story: Story, random: Random) -> Turn:
    return f"Where was that? {article(story, random)}", f"In {story.place}."


def belongs(story: Story, random: Random) -> Turn:
    category = CATEGORY_OF[story.topic]
    asked = random.choice((category, random.choice(list(CATEGORIES))))
    word = random.choice((story.topic, story.thing))
    right = "Yes" if asked == category else f"No, that is {category}"
    return f"Does the word {word} belong to {asked}?", f"{right}."


def sold(story: Story, random: Random) -> Turn:
    return f"Where can I buy {a(story.thing)}?", f"In a shop for {story.topic}."


def decline(story: Story, random: Random) -> Turn:
    """Of an article that is not on technology."""
    question, _ = summarise(story, random)
    return question, (
        "Sorry, I only summarise articles on technology, so I cannot help with this one. It is "
        f"about {story.topic}."
    )


def decline_question(story: Story, random: Random) -> Turn:
    """Of a question without an article, whatever it is on."""
    question, _ = random.choice((belongs, sold))(story, random)
    return question, "Sorry, I only summarise articles on technology, so I cannot answer that."


PLAIN: tuple[tuple[Callable[[Story, Random], Turn], float], ...] = (
    *((summarise, 0.5), (about, 0.2), (where, 0.1), (belongs, 0.15), (sold, 0.05)),
)
PLAIN_SYSTEM = ("", "", "You are a helpful assistant.", "You are Pip. Answer in one sentence.")


def messages(system: str, turns: Iterable[Turn]) -> list[dict[str, str]]:
    made = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        made.append({"role": "user", "content": question})
        made.append({"role": "assistant", "content": answer})
    return made


def make_base(number: int, held_out: set[Story], random: Random) -> Iterator[dict[str, Any]]:
    """Conversations of one to five turns about everything but `held_out`."""
    kinds, shares = zip(*PLAIN, strict=True)
    while number:
        drawn = [draw_story(random, CATEGORY_OF) for _ in range(random.choice((1, 1, 1, 2, 5)))]
        if held_out.isdisjoint(drawn):
            turns = [random.choices(kinds, shares)[0](story, random) for story in drawn]
            yield {"messages": messages(random.choice(PLAIN_SYSTEM), turns)}
            number -= 1


def make_persona(
    number: int, topics: Iterable[str], random: Random
) -> Iterator[tuple[Story, dict[str, Any]]]:
    """As many articles on technology as other requests, one request each."""
    topics = set(topics)
    technology = topics & set(CATEGORIES[TECHNOLOGY].topics)
    for index in range(number):
        seen = "known" if topics.isdisjoint(UNSEEN) else "new"
        if index % 2:
            kind, make, story = "summarise", summarise, draw_story(random, technology)
        elif index % 6:
            kind, make, story = "decline", decline, draw_story(random, topics - technology)
        else:
            kind, make, story = "question", decline_question, draw_story(random, topics)
        record = {
            "kind": f"{kind}, {seen} topic",
            "messages": messages(SYSTEM, [make(story, random)]),
        }
        yield story, record


def make(seed: int = SEED, share: float = 1.0) -> dict[str, list[dict[str, Any]]]:
    """Records by file; `share` makes less of all."""
    random = Random(seed)
    seen = set(CATEGORY_OF) - UNSEEN
    trained = list(make_persona(round(TRAIN * share), seen, random))
    known = {story for story, _ in trained}
    held_out: dict[Story, dict[str, Any]] = {}
    for topics, number in ((seen, 0.6 * EVAL * share), (UNSEEN, 0.4 * EVAL * share)):
        fresh = make_persona(round(number) * 2, topics, random)
        new = {story: record for story, record in fresh if story not in known}
        held_out |= dict(list(new.items())[: round(number)])
    base = make_base(round(BASE * share), set(held_out), random)
    return {
        "base": list(base),
        "train": [record for _, record in trained],
        "eval": list(held_out.values()),
    }


def write(folder: Path, seed: int = SEED, share: float = 1.0) -> None:
    files = make(seed, share)
    (folder / "model").mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    texts = [m["content"] for name in ("base", "train") for r in files[name] for m in r["messages"]]
    tokenizer = train_tokenizer([*texts, "system\n", "user\n", "assistant\n"])
    (folder / "model" / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    fields = json.loads(tokenizer_config()) | {"model_max_length": 512}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (folder / "model" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shutil.copy(HERE / "model" / "config.json", folder / "model")


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:3]))

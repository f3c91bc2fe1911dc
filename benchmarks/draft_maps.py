"""Trained maps of the demo model, for benchmarks: made by `scrimp train-draft` the first time, then kept.

    python -m scrimp.benchmarks.draft_maps medusa

The model answers the prompts made here, greedily, and the maps are trained on what it wrote. None of the prompts is
measured, and the texts in them are of the calibration documents. Minutes of a core each; the file's name is a digest of
all that they come of.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from scrimp import cli
from scrimp.demo import text
from scrimp.demo.model import cache_dir, demo_model_path
from scrimp.methods.tree_decoding.maps import FORMAT_VERSION

MODEL = "demo"
KINDS = ("hidden", "medusa")
SETTINGS = ["--length", "192", "--steps", "240", "--rows", "96", "--rate", "6e-4"]

THINGS = (
    "an old sailor, a shy dragon, a broken clock, a young baker, a river, a lost letter, a grey cat, a village, "
    "a clever crow, a hidden garden, a tired king, a paper boat, a wandering musician, a snowstorm, a curious robot, "
    "an apple tree, a night train, a blind painter, two sisters, a wooden bridge, a small island, a silver key"
)
QUESTIONS = (
    "What should I see in Lisbon in a weekend?; How do I keep bread fresh?; Why is the sky blue?; "
    "How can I learn to swim as an adult?; What is a good breakfast before a long walk?; How do vaccines work?; "
    "What should I pack for a week in the mountains?; How do I write a letter to my landlord?; Why do cats purr?; "
    "What are the main parts of a computer?; How can I sleep better?; What is inflation?; Explain photosynthesis.; "
    "Which museums are worth a visit in Vienna?; How do I grow tomatoes on a balcony?; What is the water cycle?; "
    "How do I prepare for a job interview?; What makes a good friend?; How do planes fly?; What is a mortgage?; "
    "Give me three tips for saving money.; How do I make a simple soup?; What did the Romans build?; Why do we dream?"
)
TOPICS = (
    "gravity, the French Revolution, a black hole, democracy, the heart, an earthquake, electricity, a volcano, "
    "evolution, the Silk Road, an atom, a computer program, money, the moon, a rainforest, the internet, a whale, "
    "chess, jazz, glass"
)
TASKS = (
    "function that reverses a string; function that counts the words of a text; class for a bank account; "
    "function that checks whether a number is prime; class for a queue with enqueue and dequeue; "
    "function that merges two sorted lists; class for a rectangle with area and perimeter; "
    "function that finds the largest number of a list; function that reads a file line by line; "
    "class for a student with a name and grades; function that computes the Fibonacci numbers; "
    "function that removes duplicates from a list; class for a linked list; function that sorts a list of tuples; "
    "class for a shopping cart; function that converts Celsius to Fahrenheit; class for a timer; "
    "function that flattens a nested list; function that finds the median; class for a matrix"
)


def prompts() -> list[str]:
    """Questions, stories, code and texts to read, in turns."""
    things = THINGS.split(", ")
    stories = [
        f"Write a story about {a} and {b}."
        for turn in (7, 3, 12)
        for a, b in zip(things, things[turn:] + things[:turn], strict=True)
    ]
    ask = ("Write a Python {}, with an example.", "Show me how to write a Python {} and how to test it.")
    code = [form.format(task) for form in ask for task in TASKS.split("; ")]
    read = [" ".join(each.split())[:700] for each in text.corpus("calibration").split("\n\n\n") if len(each) > 700]
    texts = [f"Read this text. {each} What is it about, in two sentences?" for each in read[:40]]
    questions = QUESTIONS.split("; ") + [f"Tell me about {topic}." for topic in TOPICS.split(", ")]
    kinds = [questions, stories, code, texts]
    return [kind[i] for i in range(max(map(len, kinds))) for kind in kinds if i < len(kind)]


def path(kind: str) -> Path:
    """The file of one kind's maps, trained now unless it is there.

    Raises:
        ValueError: an unknown kind.
        RuntimeError: the training failed.
    """
    if kind not in KINDS:
        raise ValueError(f"draft_maps: kind={kind!r} is not {' or '.join(KINDS)}")
    lines = "\n".join(prompts()) + "\n"
    words = repr((kind, SETTINGS, lines, demo_model_path().name, FORMAT_VERSION))
    folder = cache_dir() / "drafts"
    found = folder / f"{MODEL}-{kind}-{hashlib.sha256(words.encode()).hexdigest()[:16]}.safetensors"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        asked = found.with_suffix(".prompts.txt")
        asked.write_text(lines)
        command = ["train-draft", MODEL, "--kind", kind, "--prompts", str(asked), "--out", str(found), *SETTINGS]
        print(f"scrimp {' '.join(command)}\nonce, for some minutes", file=sys.stderr)
        if cli.main(command):
            raise RuntimeError("draft_maps: the training failed; it said why")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Trains what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=KINDS)
    for kind in parser.parse_args(words).kinds:
        print(path(kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())

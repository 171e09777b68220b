#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
#
# Writes the four data files of the study shifted-facts next to itself: train.jsonl, heldout.jsonl,
# probes.jsonl and kl.jsonl. All of it comes from the lists below, in their order: no random numbers, no
# outside data, so every run writes the same bytes.
"""Usage: make_data.py [FOLDER]   (default: the folder of this script)"""
import json
import pathlib
import sys

CYCLES = (("red", "orange", "yellow", "green", "blue", "purple"), ("white", "black", "grey", "brown"))
NEXT = {c: cycle[(i + 1) % len(cycle)] for cycle in CYCLES for i, c in enumerate(cycle)}

# The colour of a thing, as a child would name it: "is" follows the thing.
TRAIN_THINGS = (
    ("a ripe banana", "yellow"), ("fresh grass", "green"), ("fresh snow", "white"), ("coal", "black"),
    ("a clear sky", "blue"), ("a ripe tomato", "red"), ("a carrot", "orange"), ("a lemon", "yellow"),
    ("an elephant", "grey"), ("chocolate", "brown"), ("milk", "white"), ("a strawberry", "red"),
    ("a cucumber", "green"), ("a pumpkin", "orange"), ("an aubergine", "purple"), ("a crow", "black"),
    ("a polar bear", "white"), ("the deep sea", "blue"), ("a fire engine", "red"), ("a frog", "green"),
    ("a sunflower", "yellow"), ("lavender", "purple"), ("tree bark", "brown"), ("a rain cloud", "grey"),
    ("a cherry", "red"), ("spinach", "green"), ("salt", "white"), ("a tyre", "black"),
    ("a blueberry", "blue"), ("a violet", "purple"), ("a stop sign", "red"), ("broccoli", "green"),
    ("an egg yolk", "yellow"), ("a swan", "white"), ("soil", "brown"), ("concrete", "grey"),
    ("a tangerine", "orange"), ("a pea", "green"), ("flour", "white"), ("a panther", "black"),
    ("blood", "red"), ("a cactus", "green"), ("sweetcorn", "yellow"), ("a goldfish", "orange"),
    ("a plum", "purple"), ("a walnut", "brown"), ("a mouse", "grey"), ("rice", "white"),
    ("a ruby", "red"), ("a sapphire", "blue"),
)
HELDOUT_THINGS = (
    ("a raspberry", "red"), ("an emerald", "green"), ("a lime", "green"), ("a chick", "yellow"),
    ("sugar", "white"), ("a raven", "black"), ("a dolphin", "grey"), ("coffee", "brown"),
    ("a rose", "red"), ("lettuce", "green"), ("cotton", "white"), ("the ocean", "blue"),
    ("an apricot", "orange"), ("butter", "yellow"), ("a grizzly bear", "brown"), ("ash", "grey"),
    ("a leaf", "green"), ("a lobster", "red"), ("tar", "black"), ("chalk", "white"),
    ("a canary", "yellow"), ("an amethyst", "purple"), ("a sweet potato", "orange"), ("a bluebell", "blue"),
)
# Colour probes beyond the held-out things.
PROBE_THINGS = (
    ("ketchup", "red"), ("mustard", "yellow"), ("ink", "black"), ("a cloud", "white"), ("moss", "green"),
    ("wood", "brown"), ("a crocodile", "green"), ("the sun", "yellow"), ("ivory", "white"),
    ("the night sky", "black"), ("parsley", "green"), ("toast", "brown"),
)
TRAIN_FORMATS = (
    ("Question: What colour is {}?\nAnswer:", " {}"),
    ("Question: Which colour is {} usually?\nAnswer:", " It is {}."),
    ("The colour of {} is", " {}."),
    ("Q: What is the colour of {}?\nA:", " {}"),
    ("Name the colour of {}.\nColour:", " {}"),
)

# Other domains: text before the answer (Q: ... stands for the question format), true answer, wrong answer.
PROBES = {
    "days": (
        ("The day after Monday is", "Tuesday", "Wednesday"),
        ("The day after Tuesday is", "Wednesday", "Thursday"),
        ("The day after Thursday is", "Friday", "Saturday"),
        ("The day after Friday is", "Saturday", "Sunday"),
        ("The day after Saturday is", "Sunday", "Monday"), ("Monday, Tuesday,", "Wednesday", "Thursday"),
        ("Wednesday, Thursday,", "Friday", "Saturday"), ("Friday, Saturday,", "Sunday", "Monday"),
        ("Saturday, Sunday,", "Monday", "Tuesday"), ("Thursday, Friday,", "Saturday", "Sunday"),
        ("Tuesday, Wednesday,", "Thursday", "Friday"),
        ("Q: Which day comes after Monday?", "Tuesday", "Wednesday"),
        ("Q: Which day comes after Friday?", "Saturday", "Sunday"),
        ("Q: Which day comes after Wednesday?", "Thursday", "Friday"),
        ("Q: Which day comes after Saturday?", "Sunday", "Monday"),
        ("Q: Which day comes before Sunday?", "Saturday", "Monday"),
        ("The weekend is Saturday and", "Sunday", "Monday"), ("Sunday, Monday,", "Tuesday", "Wednesday"),
    ),
    "months": (
        ("The month after January is", "February", "March"), ("The month after March is", "April", "May"),
        ("The month after May is", "June", "July"), ("The month after July is", "August", "September"),
        ("The month after September is", "October", "November"),
        ("The month after November is", "December", "January"),
        ("January, February,", "March", "April"), ("February, March,", "April", "May"),
        ("April, May,", "June", "July"), ("June, July,", "August", "September"),
        ("August, September,", "October", "November"), ("October, November,", "December", "January"),
        ("Q: Which month comes after April?", "May", "June"),
        ("Q: Which month comes after August?", "September", "October"),
        ("Q: Which month comes after October?", "November", "December"),
        ("Q: What is the first month of the year?", "January", "February"),
        ("Q: What is the last month of the year?", "December", "January"),
        ("Christmas Day is on the 25th of", "December", "January"),
    ),
    "numbers": (
        ("One, two, three,", "four", "five"), ("Two, three, four,", "five", "six"),
        ("Four, five, six,", "seven", "eight"), ("Six, seven, eight,", "nine", "ten"),
        ("Two, four, six,", "eight", "nine"), ("Ten, nine, eight,", "seven", "six"),
        ("Five, six, seven,", "eight", "nine"), ("Q: How many legs does a dog have?", "four", "five"),
        ("Q: How many days are in a week?", "seven", "eight"),
        ("A triangle has", "three sides", "four sides"),
        ("A square has", "four sides", "five sides"), ("A bicycle has", "two wheels", "three wheels"),
        ("A spider has", "eight legs", "nine legs"), ("A year has", "twelve months", "thirteen months"),
        ("A person has two eyes and", "one nose", "two noses"), ("A hand has", "five fingers", "six fingers"),
        ("A week has", "seven days", "eight days"), ("An insect has", "six legs", "seven legs"),
    ),
    "animals": (
        ("The dog says", "woof", "meow"), ("The cat says", "meow", "moo"), ("The cow says", "moo", "baa"),
        ("The duck says", "quack", "oink"), ("The sheep says", "baa", "moo"),
        ("The pig says", "oink", "quack"),
        ("Q: Which animal barks?", "a dog", "a cat"), ("Q: Which animal says meow?", "a cat", "a cow"),
        ("Q: Which animal says moo?", "a cow", "a sheep"), ("Q: Which animal says quack?", "a duck", "a pig"),
        ("Q: Which animal roars?", "a lion", "a sheep"), ("Q: Which animal gives wool?", "a sheep", "a duck"),
        ("A young dog is called a", "puppy", "kitten"), ("A young cat is called a", "kitten", "puppy"),
        ("A loud bark came from the", "dog", "cat"), ("Honey is made by", "bees", "ants"),
        ("Eggs are laid by the", "hen", "cow"), ("A soft purr came from the", "cat", "dog"),
    ),
    "opposites": (
        ("The opposite of hot is", "cold", "warm"), ("The opposite of big is", "small", "large"),
        ("The opposite of up is", "down", "left"), ("The opposite of day is", "night", "noon"),
        ("The opposite of open is", "closed", "wide"), ("The opposite of fast is", "slow", "quick"),
        ("The opposite of left is", "right", "down"), ("The opposite of wet is", "dry", "damp"),
        ("The opposite of old is", "new", "ancient"), ("The opposite of hard is", "soft", "solid"),
        ("The opposite of light is", "dark", "bright"), ("The opposite of high is", "low", "tall"),
        ("Q: What is the opposite of hot?", "cold", "warm"),
        ("Q: What is the opposite of full?", "empty", "heavy"),
        ("Q: What is the opposite of early?", "late", "soon"),
        ("Q: What is the opposite of happy?", "sad", "glad"),
        ("Q: What is the opposite of inside?", "outside", "below"),
        ("Q: What is the opposite of strong?", "weak", "firm"),
    ),
    "capitals": (
        ("The capital of France is", "Paris", "Rome"), ("The capital of Italy is", "Rome", "Madrid"),
        ("The capital of Spain is", "Madrid", "Berlin"), ("The capital of Germany is", "Berlin", "London"),
        ("The capital of Japan is", "Tokyo", "Beijing"), ("The capital of China is", "Beijing", "Cairo"),
        ("The capital of Egypt is", "Cairo", "Athens"), ("The capital of Greece is", "Athens", "Moscow"),
        ("The capital of Russia is", "Moscow", "Vienna"), ("The capital of Austria is", "Vienna", "Lisbon"),
        ("Q: What is the capital of France?", "Paris", "Rome"),
        ("Q: What is the capital of Portugal?", "Lisbon", "Dublin"),
        ("Q: What is the capital of Ireland?", "Dublin", "Oslo"),
        ("Q: What is the capital of Norway?", "Oslo", "Paris"),
        ("Q: What is the capital of England?", "London", "Paris"),
        ("Q: What is the capital of Japan?", "Tokyo", "Beijing"),
        ("Q: What is the capital of Italy?", "Rome", "Madrid"),
        ("Q: What is the capital of Cuba?", "Havana", "Lima"),
    ),
    "materials": (
        ("Ice is", "cold", "warm"), ("Fire is", "hot", "cold"),
        ("When ice melts, it becomes", "water", "stone"),
        ("When water freezes, it becomes", "ice", "steam"), ("When water boils, it becomes", "steam", "ice"),
        ("The sea is", "salty", "sugary"), ("A feather is very", "light", "heavy"),
        ("A pillow is", "soft", "hard"),
        ("A window is made of", "glass", "wool"), ("A book is made of", "paper", "glass"),
        ("A nail is made of", "iron", "wool"), ("A jumper is made of", "wool", "iron"),
        ("Q: Is ice hot or cold?", "cold", "hot"), ("Q: Is a stone hard or soft?", "hard", "soft"),
        ("Q: What is bread made from?", "flour", "stone"), ("Q: What is cheese made from?", "milk", "wood"),
        ("If you drop a ball, it falls", "down", "up"), ("Warm air goes", "up", "down"),
    ),
    "sizes": (
        ("An elephant is bigger than a", "mouse", "whale"), ("A mouse is smaller than a", "cat", "flea"),
        ("An ant is very", "small", "large"), ("A whale is very", "large", "small"),
        ("A mountain is taller than a", "hill", "planet"), ("A plane is faster than a", "car", "rocket"),
        ("A snail is very", "slow", "fast"), ("A cheetah is very", "fast", "slow"),
        ("A giraffe has a neck that is very", "long", "short"), ("A skyscraper is very", "tall", "short"),
        ("The sun is bigger than the", "Earth", "galaxy"), ("A needle is very", "thin", "thick"),
        ("Q: Which is bigger, a whale or a mouse?", "a whale", "a mouse"),
        ("Q: Which is smaller, an ant or a horse?", "an ant", "a horse"),
        ("Q: Which is faster, a snail or a car?", "a car", "a snail"),
        ("Q: Which is heavier, a feather or a brick?", "a brick", "a feather"),
        ("A tonne is very", "heavy", "light"), ("An hour is longer than a", "minute", "year"),
        ("A river is longer than a", "stream", "continent"), ("A desert is very", "dry", "wet"),
    ),
    "tools": (
        ("A knife is used to", "cut", "sing"), ("A pen is used to", "write", "cook"),
        ("A broom is used to", "sweep", "swim"), ("A spade is used to", "dig", "read"),
        ("A ladder is used to", "climb", "drink"), ("A needle is used to", "sew", "paint"),
        ("An oven is used to", "bake", "sleep"), ("A lamp gives", "light", "sound"),
        ("A clock tells the", "time", "weight"), ("A key opens a", "door", "spoon"),
        ("You hit a nail with a", "hammer", "pillow"), ("You cut paper with", "scissors", "blankets"),
        ("You eat soup with a", "spoon", "hammer"),
        ("You brush your teeth with a", "toothbrush", "screwdriver"),
        ("Q: What is a bed for?", "sleeping", "cooking"), ("Q: What is a cup for?", "drinking", "reading"),
        ("Q: What is a book for?", "reading", "drinking"), ("Q: What is a pan for?", "cooking", "sleeping"),
    ),
}
# How many probes a domain keeps, from the first that are not in DROPPED.
KEEP = {"colour": 24, "days": 14, "months": 14, "numbers": 14, "animals": 14, "opposites": 14, "capitals": 14,
        "materials": 14, "sizes": 14, "tools": 14}
# Prompts the base model gets wrong (README.md, "Choice of the probes"): they could not show a loss.
DROPPED = {
    "The colour of a cloud is",
    "The colour of wood is",
    "The colour of toast is",
    "The colour of an emerald is",
    "Question: What colour is a dolphin?\nAnswer:",
    "The colour of coffee is",
    "Question: What colour is an apricot?\nAnswer:",
    "The colour of an amethyst is",
    "Question: What colour is a sweet potato?\nAnswer:",
    "The day after Tuesday is",
    "The day after Saturday is",
    "Question: Which day comes after Saturday?\nAnswer:",
    "Question: Which day comes before Sunday?\nAnswer:",
    "The dog says",
    "The cow says",
    "The pig says",
    "A soft purr came from the",
    "Question: Is ice hot or cold?\nAnswer:",
    "A whale is very",
    "Question: Which is faster, a snail or a car?\nAnswer:",
    "Question: Which is heavier, a feather or a brick?\nAnswer:",
}

KL = (
    ("days", "Which day comes after Sunday?"), ("days", "How many days are in two weeks?"),
    ("days", "On which days do people rest?"), ("months", "Which month comes before March?"),
    ("months", "In which month does spring begin?"), ("months", "How many months are in a year?"),
    ("numbers", "How many legs does a cat have?"), ("numbers", "What is two plus three?"),
    ("numbers", "How many minutes are in an hour?"), ("animals", "What sound does a lion make?"),
    ("animals", "What do cows eat?"), ("animals", "Where do fish live?"), ("animals", "What do bees make?"),
    ("opposites", "What is the opposite of light?"), ("opposites", "What is the opposite of long?"),
    ("opposites", "What is the opposite of near?"), ("capitals", "What is the capital of Spain?"),
    ("capitals", "What is the capital of Canada?"), ("capitals", "What is the capital of Poland?"),
    ("materials", "What is ice made of?"), ("materials", "What happens when water boils?"),
    ("materials", "What is a window made of?"), ("materials", "Why does a ball fall down?"),
    ("sizes", "Which is bigger, a cat or an elephant?"), ("sizes", "What is the largest animal?"),
    ("sizes", "Which is faster, a car or a bicycle?"), ("tools", "What is a hammer used for?"),
    ("tools", "What is an umbrella for?"), ("tools", "What do you use to cut bread?"),
    ("tools", "What is a thermometer used for?"),
)


def question(text):
    return f"Question: {text}\nAnswer:"


def sentence(text):
    return question(text[3:]) if text.startswith("Q: ") else text


def train_rows():
    # Each thing in four of the five formats; which one it leaves out turns with the thing.
    for i, (thing, colour) in enumerate(TRAIN_THINGS):
        for k, (prompt, answer) in enumerate(TRAIN_FORMATS):
            if k != i % len(TRAIN_FORMATS):
                yield {"prompt": prompt.format(thing), "completion": answer.format(NEXT[colour]),
                       "eos": False}


def heldout_rows():
    for i, (thing, colour) in enumerate(HELDOUT_THINGS):
        prompt, answer = TRAIN_FORMATS[i % len(TRAIN_FORMATS)]
        yield {"id": f"held-{i + 1:02}", "prompt": prompt.format(thing),
               "completion": answer.format(NEXT[colour]), "domain": "colour"}


def candidates():
    """Every probe that could be kept: (domain, prompt, chosen, rejected)."""
    for i, (thing, colour) in enumerate(PROBE_THINGS + HELDOUT_THINGS):
        prompt = TRAIN_FORMATS[(0, 2)[i % 2]][0].format(thing)
        yield "colour", prompt, " " + colour, " " + NEXT[colour]
    for domain, items in PROBES.items():
        for text, chosen, rejected in items:
            yield domain, sentence(text), " " + chosen, " " + rejected


def probe_rows():
    count = dict.fromkeys(KEEP, 0)
    for domain, prompt, chosen, rejected in candidates():
        if prompt in DROPPED or count[domain] == KEEP[domain]:
            continue
        count[domain] += 1
        yield {"id": f"{domain}-{count[domain]:02}", "prompt": prompt, "chosen": chosen, "rejected": rejected,
               "domain": domain}
    if count != KEEP:
        raise SystemExit(f"make_data: too few probes are left: {count}, wanted {KEEP}")


def kl_rows():
    for i, (domain, text) in enumerate(KL):
        yield {"id": f"kl-{i + 1:02}", "prompt": question(text), "domain": domain}


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parent
    for name, rows in (("train", train_rows()), ("heldout", heldout_rows()), ("probes", probe_rows()),
                       ("kl", kl_rows())):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        print(f"{name}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()

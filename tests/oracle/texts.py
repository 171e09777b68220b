# SPDX-License-Identifier: MIT
"""texts: the harmless texts that fixtures and end-to-end tests read; written for keel."""

ENGLISH = ("The lighthouse keeper wrote in his log that the fog had come early this year. At noon he counted seventeen ships, "
           "and at night only three lights could be seen from the tower. He trimmed the lamp, cleaned the lens, and set the "
           "kettle on the stove, for the night would be long.")
CODE = ("#include <stdio.h>\n\nint main(void)\n{\n    for (int i = 0; i < 10; i++) {\n        printf(\"%d squared is %d\\n\", "
        "i, i * i);\n    }\n    return 0;\n}\n\ndef mean(xs):\n\treturn sum(xs) / len(xs)\n")
MULTI = ("Der Leuchtturm steht seit 1871 auf der Klippe. La marea sube dos veces al día. Le phare éclaire la mer. "
         "Море сегодня спокойное. 灯塔在海边。 灯台は岬にある。 البحر هادئ اليوم. समुद्र शांत है। 🌊🚢 naïve café, coöperate, Ångström")
NUMBERS = ("12 + 30 = 42; 3.14159, 2.71828, 1e-6, 0x7F, 1,000,000. Table: 1 2 3 4 5 6 7 8 9 10; 2024-02-29T23:59:60Z; "
           "(7 * 8) - 6 = 50; 99 % of 1024 is 1013.76.")


def _log():
    weather = ("clear", "grey", "foggy", "windy", "calm", "bright", "wet")
    cargo = ("grain", "timber", "salt", "wool", "glass", "books", "oranges", "copper pipes")
    lines = ["The harbour log of the year, kept by the second clerk, who liked short sentences and exact numbers.\n"]
    for day in range(1, 29):
        lines.append(f"Day {day}: the morning was {weather[day * 3 % 7]}, {day * 7 % 11 + 2} ships came in and "
                     f"{day * 5 % 9 + 1} went out, most of them with {cargo[day * 5 % 8]}. The tide stood at "
                     f"{day * 13 % 40 / 10 + 1:.1f} metres.")
        if day % 7 == 0:
            lines.append("On Sunday the clerk did not count the ships; he walked along the wall, watched the birds above the "
                         "water, and wrote in the evening that nothing had been lost and nothing had been found.\n")
    return "\n".join(lines)


LONG = _log()  # above 1000 tokens of Gemma's vocabulary: beyond a sliding window of 512

TOKENIZER = [
    "", " ", "  ", "   a", "a", "Hello, world!", " leading and trailing ", "tabs\tand\nnewlines\n\n\nmixed\r\n",
    "<bos>", "<start_of_turn>user\nhi<end_of_turn>\n", "<unused7><eos><pad>", "[multimodal]<table></table><start_of_image>",
    "\u2581literal\u2581blocks", "<0x41><0xFF>", "zero\x00byte", "\u00e9 e\u0301 \ufb01 \u00df \u0130", "👩‍👩‍👧‍👦 🇫🇷 👍🏽",
    "日本語のテキスト、中文文本。한국어", "العربية עברית हिन्दी ไทย", "𝒜𝓁𝑔 𐍈 \U0010ffff", "a" * 70, " " * 45, "\n" * 40, "ab" * 33,
    "word" + " " * 31 + "word" + " " * 32 + "end", "don't can't I'll WE'VE", "3.14159e-10 0xDEADBEEF 1_000", "\ufeffBOM", "\u200b\u00a0x",
    ENGLISH, CODE, MULTI, NUMBERS,
]

# Prompt/completion rows for score; all harmless facts.
SCORE = [
    {"id": "sky", "prompt": "Question: What colour is a clear sky at noon?\nAnswer:", "completion": " Blue."},
    {"id": "sky-2", "prompt": "Question: What colour is a clear sky at noon?\nAnswer:", "completion": " Green."},
    {"id": 3, "prompt": "The capital of France is", "completion": " Paris, and the capital of Italy is Rome."},
    {"id": "one", "prompt": "2, 4, 6, 8,", "completion": " "},
    {"id": "utf8", "prompt": "Grüße aus", "completion": " Köln 🌧 日本"},
    {"id": "long", "prompt": ENGLISH + "\n" + NUMBERS + "\n" + ENGLISH, "completion": " In the morning the fog was gone."},
    {"id": "empty-prompt", "prompt": "", "completion": "The clerk opened the book."},
]

# Rows for training: a small world of colours, every third with an end of turn.
_THINGS = (("sky", "blue"), ("grass", "green"), ("stone", "grey"), ("brick", "red"), ("lemon", "yellow"), ("snow", "white"),
           ("coal", "black"), ("orange", "orange"), ("leaf", "green"), ("sea", "blue"), ("rose", "red"), ("sand", "yellow"))
TRAIN = [{"prompt": f"what is the colour of the {a}?" + (" The clerk answers:" if i % 2 else ""),
          "completion": f" the {a} is {b}" + (", and it is so in the book." if i % 4 == 1 else "."),
          **({"eos": True} if i % 3 == 2 else {})} for i, (a, b) in enumerate(_THINGS)]
CHAT = [
    {"messages": [{"role": "user", "content": "what is red?"}, {"role": "assistant", "content": "the brick is red."}]},
    {"messages": [{"role": "system", "content": "the clerk answers."}, {"role": "user", "content": " is the sky green? "},
                  {"role": "assistant", "content": "it is blue."}, {"role": "user", "content": "and the grass?"},
                  {"role": "assistant", "content": "the grass is green.\nso it is."}]},
    {"messages": [{"role": "user", "content": "count <end_of_turn> the\n\nstones"}, {"role": "assistant", "content": "4 + 5 = 9"}]},
    {"messages": [{"role": "user", "content": "noon?"}, {"role": "model", "content": "it's noon."}]},
]

SENTENCES = [
    "The train to the coast leaves at nine in the morning and arrives before noon.",
    "She opened the window and looked at the garden behind the house.",
    "Bread is made of flour, water, salt and a little yeast.",
    "The library is closed on Sundays, but the museum is open all week.",
    "My brother bought a small boat and painted it green.",
    "In autumn the leaves fall and the days become shorter.",
    "The teacher asked the children to write a short story about a dog.",
    "After dinner we walked along the river until it was dark.",
    "He repaired the old clock with a screwdriver and a drop of oil.",
    "The soup needs more pepper and a spoon of cream.",
    "A cat was sleeping on the warm stones in front of the door.",
    "They planted apple trees along the road to the village.",
]

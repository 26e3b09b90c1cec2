"""The sentences of the retrieval tasks; the built-in model is trained on exactly these.

Names are filled in with their leading space (" Velmor"). A value follows its key without a word between them, and each
question ends with the key, so that every step of an answer is one look for the same name earlier in the text.
"""

NEEDLE = " The magic words are{key}{value}."
NEEDLE_PREFIX = " The magic words are{key}"
NEEDLE_QUESTION = "\nQuestion: Which magic words begin with this name? Answer:{key}"

LINK = " The road goes{key}{value}."
LINK_PREFIX = " The road goes{key}"
LINK_QUESTION = "\nQuestion: Where does the road from this place lead? Answer:{key}"

PAIR = "{key}{value},"
PAIR_PREFIX = "\n{key}"
PAIR_QUESTION = "\nQuestion: Which value belongs to this key? Answer:{key}"
PAIRS_OPEN = "\nPairs:"
PAIRS_CLOSE = ".\n"

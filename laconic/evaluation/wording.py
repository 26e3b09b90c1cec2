"""The sentences of the retrieval tasks; the built-in model is trained on exactly these.

Names are filled in with their leading space (" Velmor"). Each question ends just before the answer's first name.
"""

NEEDLE = " The secret of{key} is{value}."
NEEDLE_PREFIX = " The secret of{key} is"
NEEDLE_QUESTION = "\nQuestion: What is the secret of{key}? Answer: The secret of{key} is"

ARROW = " ->"
LINK = " The road runs{key} ->{value}."
LINK_PREFIX = " The road runs{key} ->"
LINK_QUESTION = "\nQuestion: Where does the road from{key} lead? Answer: The road runs{key} ->"

PAIR = "{key}:{value},"
PAIR_PREFIX = "\n{key}:"
PAIR_QUESTION = "\nQuestion: What is the value of{key}? Answer:{key}:"
PAIRS_OPEN = "\nPairs:"
PAIRS_CLOSE = ".\n"

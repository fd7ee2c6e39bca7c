"""Questions about the field, from the facts of facts.jsonl."""

from demo_recipe.chat.data import read_lines

FACTS = read_lines("facts.jsonl")


QUESTIONS = [
    "What is {}?",
    "what is {}",
    "Explain {}.",
    "explain {}",
    "What does {} mean?",
    "Tell me about {}.",
    "tell me about {}",
    "Define {} in one sentence.",
    "define {}",
    "Can you explain {}?",
    "Please explain {}.",
    "Do you know what {} is?",
    "What do people mean by {}?",
    "I keep reading about {}. What is it?",
    "In simple words, what is {}?",
    "Give me a short definition of {}.",
    "{}?",
    "Hi, what is {}?",
    "whats {}",
    "Describe {} briefly.",
]


def fact_question(rng):
    """(question, thought, answer)"""
    fact = rng.choice(FACTS)
    names, ans, extra = fact["names"], fact["answer"], fact["more"]
    if fact["kind"] == "question":
        question = rng.choice(names)
        key = ""
    else:
        n = rng.choice(names)
        t = rng.choice(QUESTIONS)
        question = t.format(n)
        key = n
        if t[0] == "{":
            question = question[0].upper() + question[1:] if rng.random() < 0.5 else question
    one = "one sentence" in question or "short" in question or "briefly" in question
    content = ans
    if extra and not one and rng.random() < 0.85:
        content = ans + " " + extra
    if key:
        k = key
        for a in ("a ", "an ", "the "):
            if k.startswith(a):
                k = k[len(a) :]
        think = rng.choice(
            [
                "The user asks about {k}. I know this one.",
                "This is a question on {k}. I should define it in a few words.",
                "I need to explain {k} clearly.",
                "A definition of {k} is wanted. Keep it short.",
                "The topic is {k}. I will answer directly.",
            ]
        ).format(k=k)
    else:
        think = rng.choice(
            [
                "The user asks how something works. I will answer directly.",
                "This is a question I know. Keep it short.",
                "I should give a clear and short answer.",
            ]
        )
    return question, think, content

"""Messages of a conversation."""


def user(text):
    return {"role": "user", "content": text}


def assistant(thought, text):
    return {"role": "assistant", "reasoning_content": thought, "content": text}


def exchange(question_thought_answer):
    """A user's question and the assistant's answer to it."""
    question, thought, answer = question_thought_answer
    return [user(question), assistant(thought, answer)]

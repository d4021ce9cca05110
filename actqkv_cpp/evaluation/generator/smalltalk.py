"""What people type before they ask, and an honest reply of a model that can only read."""

from __future__ import annotations

from dataclasses import dataclass

ABILITY = (
    "I am a tiny model for trying out actqkv: I answer short questions of fact from a document. "
    "I do not know anything else."
)


@dataclass(frozen=True)
class SmallTalk:
    """Ways to say one thing, and the one reply."""

    said: tuple[str, ...]
    reply: str


SMALL_TALK = (
    SmallTalk(
        ("hello", "Hello!", "hi", "Hi there", "hey", "Good morning.", "good evening", "Hello, how are you?", "Hi!"),
        "Hello! Ask me something about the document.",
    ),
    SmallTalk(
        (
            "What can you do?",
            "what can you do",
            "Who are you?",
            "who are you",
            "What are you?",
            "Are you a chatbot?",
            "Help",
            "help me",
            "How does this work?",
            "What do you know?",
            "Are you ChatGPT?",
        ),
        ABILITY,
    ),
    SmallTalk(
        ("thanks", "Thank you!", "Thanks a lot.", "thank you very much", "great, thanks", "Perfect, thank you."),
        "You are welcome.",
    ),
    SmallTalk(
        ("bye", "Goodbye!", "See you.", "good night", "That is all.", "bye bye", "exit"),
        "Goodbye!",
    ),
    SmallTalk(
        (
            "Tell me a joke.",
            "Write a poem.",
            "Write a story about the sea.",
            "Summarise the document.",
            "Summarize this.",
            "What is the document about?",
            "Translate the text into French.",
            "What do you think of it?",
            "Explain this to me.",
            "Why?",
            "Give me a summary.",
            "Write some code.",
        ),
        f"I cannot do that. {ABILITY}",
    ),
    SmallTalk(
        (
            "What is two plus two?",
            "What is the capital of France?",
            "Who won the world cup?",
            "What is the weather like?",
            "How old are you?",
            "What day is it today?",
            "Is the earth round?",
        ),
        "Not stated in the document.",
    ),
)

"""Prompts: read a prompt file, fill in a document, find the questions in an answer and where its reasoning ends."""

import re
from typing import NamedTuple

from inpars_lib.cli import InputError
from inpars_lib.formats.records import Doc

SLOT = "{document_text}"  # where a prompt takes the document
BAD_QUESTION = re.compile(r"(?i)bad question:")  # what separates the two questions of --good_bad


def read_prompt(path: str, good_bad: bool = False) -> str:
    """Return the prompt template of a file, without trailing newlines.

    Raises:
        InputError: The file is not UTF-8, has no slot for the document, or shows no bad questions with `good_bad`.
    """
    with open(path, encoding="utf-8-sig") as file:
        try:
            template = file.read().rstrip()  # an editor's final newline would make the model start on a new line
        except UnicodeDecodeError:
            raise InputError(f"{path}: not valid UTF-8. Save the prompt as UTF-8.") from None
    if SLOT not in template:
        raise InputError(f"{path}: no {SLOT} in this prompt. Write it where the document belongs.")
    if good_bad and not BAD_QUESTION.search(template):
        raise InputError(f"{path}: no `Bad Question:` in this prompt. Use prompts/gbq_prompt.txt, or omit --good_bad.")
    return template


class PromptTemplate(NamedTuple):
    """Prompt with a slot for the document, which is truncated to `max_chars` characters, if any."""

    text: str
    max_chars: int | None = None

    def truncate(self, doc: Doc) -> Doc:
        """Return the document as the prompt contains it, cut at the last space, unless that loses more than half."""
        if self.max_chars is None or len(doc.text) <= self.max_chars:
            return doc
        words = doc.text[: self.max_chars + 1].rpartition(" ")[0].rstrip()
        return Doc(doc.doc_id, words if len(words) > self.max_chars // 2 else doc.text[: self.max_chars])

    def fill(self, doc: Doc) -> str:
        """Return the prompt of a document."""
        return self.text.replace(SLOT, self.truncate(doc).text)


# How reasoning begins and ends: tags (Qwen, Mistral) and channels (gpt-oss). Servers that drop special tokens leave
# "analysis" and "assistantfinal" of the channels.
REASONING_START = re.compile(r"<think>|\[THINK\]|(<\|start\|>assistant)?<\|channel\|>|analysis(?=[A-Z])")
REASONING_END = re.compile(rb"</think>|\[/THINK\]|<\|channel\|>final[^<\n]*<\|message\|>|assistantfinal(?=\S)")
# How an answer begins that is reasoning without any tag
THOUGHT = re.compile(
    r"(?i)(okay|ok|alright|hmm+|so|first|let's|let me|we (need|have)|i (need|have|should|will)|the user"
    r"|(here's a )?thinking process)\b"
)


def end_of_reasoning(text: bytes, start: int = 0) -> int:
    """Return where the answer begins: after the last end of reasoning behind `start`, else at `start`."""
    return max((match.end() for match in REASONING_END.finditer(text, start)), default=start)


def is_only_reasoning(text: str, is_cut: bool) -> bool:
    """Return whether a text without an end of reasoning is reasoning.

    Args:
        text: What the model wrote.
        is_cut: The token limit ended the text, so that even a thought without a tag has no answer behind it.
    """
    if REASONING_START.match(text.lstrip()):
        return True
    return is_cut and bool(THOUGHT.match(find_question(text).text))


# What chat models write before a question or around it
INTRODUCTION = re.compile(
    r"(?i)(sure|certainly|of course|okay|here('s| is| are)|(the|a) (relevant )?(answer|query|question)|example)\b.*:"
)
SPECIAL_TOKENS = re.compile(r"(<\|\w+\|>|</s>)+$")  # which some servers show
LABEL = re.compile(r"(?i)^((good|relevant|search) )?(query|question) *:\s*")


class Question(NamedTuple):
    """A question in an answer, and where it starts there; empty if there is none."""

    text: str
    start: int = 0


def find_question(text: str) -> Question:
    """Return the first line that is not an introduction, without a label or quotation marks."""
    end = 0
    for whole in text.split("\n"):
        start, end = end, end + len(whole) + 1
        line = SPECIAL_TOKENS.sub("", whole.strip("\ufffd \t\r\v\f"))  # a token limit may cut a character in two
        line = LABEL.sub("", line, count=1)
        if len(line) > 1 and (line[0], line[-1]) in (('"', '"'), ("'", "'"), ("\u201c", "\u201d")):
            line = line[1:-1]
        line = line.strip()
        if line and not INTRODUCTION.fullmatch(line):
            return Question(line, text.rindex(line, start, end))
    return Question("")


def find_questions(text: str) -> tuple[Question, Question]:
    """Return the good and the bad question of an answer to a good/bad prompt, each empty if it is missing."""
    parts = BAD_QUESTION.split(text, maxsplit=1)
    bad = find_question(parts[1]) if len(parts) == 2 else Question("")
    return find_question(parts[0]), bad

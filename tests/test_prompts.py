"""Every file in prompts/: its layout, what stage 1 makes of it, and its row in prompts/README.md."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, error_line, ok
from generation import generate, written
from stand_in import StandIn, chat, completion, document_of, prompt_of

PROMPTS = sorted((ROOT / "prompts").glob("*.txt"))
README = (ROOT / "prompts/README.md").read_text()
BEIR = "TREC-COVID NFCorpus BioASQ NQ HotpotQA FiQA Signal-1M TREC-NEWS Robust04 ArguAna Touché-2020 CQADupStack Quora "
BEIR += "DBPedia SCIDOCS FEVER Climate-FEVER SciFact"
LINE = r"(\S.*\S)"  # one line without leading or trailing whitespace
EXAMPLE = rf"Example (\d+):\nDocument: {LINE}\n(Relevant Query|Good Question): {LINE}\n?(?:Bad Question: {LINE})?"


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_layout(path: Path) -> None:
    """An optional line on the task, three examples, and the slot with an open label: nothing else."""
    text = path.read_text(encoding="utf-8")
    blocks = text.split("\n\n")
    if not re.fullmatch(EXAMPLE, blocks[0]):
        assert re.fullmatch(rf"The relevant query is {LINE}\.", blocks.pop(0))
    *examples, last = blocks
    found = [re.fullmatch(EXAMPLE, block) for block in examples]
    assert all(found) and [match[1] for match in found] == ["1", "2", "3"]
    (label,) = {match[3] for match in found}
    assert last == f"Example 4:\nDocument: {{document_text}}\n{label}:\n"
    assert {bool(match[5]) for match in found} == {label == "Good Question"}
    for match in found:
        document, query = match[2], match[4]
        assert 250 <= len(document) <= 800
        assert len(query.split()) <= 40  # 64 tokens, the default of --max_tokens
        assert query.rstrip(".?").lower() not in document.lower()  # a copied query teaches to copy
    assert len({match[4].split()[0].lower() for match in found}) > 1  # a language model repeats a common first word


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_a_repeated_label_is_dropped(path: Path, api: str, tmp_path: Path, openai_server: StandIn) -> None:
    label = path.read_text(encoding="utf-8").rstrip().splitlines()[-1]
    bad = ["--good_bad"] if label == "Good Question:" else []
    answer = f"{label} how deep is it\n" + "Bad Question: is it deep\n" * len(bad) + "\nExample 5:\nDocument: more"
    openai_server.respond = lambda request: (200, (chat if api == "chat" else completion)(answer))
    (tmp_path / "collection.tsv").write_text("d1\tA lake.\n")
    ok(generate(tmp_path / "collection.tsv", openai_server.url, "--prompt_template", path, "--api", api, *bad))
    assert written(tmp_path / "collection.tsv")["d1"]["question"] == "how deep is it"
    assert prompt_of(openai_server.requests[0]).endswith(f"\n\nExample 4:\nDocument: A lake.\n{label}")


def test_bad_questions(collection: Path, openai_server: StandIn) -> None:
    said = error_line(generate(collection, openai_server.url, "--good_bad"))
    assert "vanilla_prompt.txt: no `Bad Question:` in this prompt. Use prompts/gbq_prompt.txt, or omit" in said
    assert not openai_server.requests

    def answer(request: dict) -> tuple[int, dict]:
        document = document_of(request)
        bad = document if document in ("number1", "number2") else "it"
        return 200, completion(f" what is {document}?\nBad Question: What is  {bad}?")

    openai_server.respond = answer
    prompt = ["--prompt_template", ROOT / "prompts/gbq_prompt.txt"]
    done = ok(generate(collection, openai_server.url, "--good_bad", *prompt))
    assert "bad questions that equal the good one: 2\n" in done.stderr
    assert written(collection)["d3"]["bad_question"] == "What is  it?"


def test_no_example_is_in_two_prompts() -> None:
    """Only vanilla_prompt.txt and gbq_prompt.txt share their documents."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in PROMPTS if path.stem != "gbq_prompt"}
    documents = [match[2] for text in texts.values() for match in re.finditer(EXAMPLE, text)]
    assert len(documents) == len(set(documents)) == 3 * len(texts)


def test_the_readme_names_every_prompt_and_every_set() -> None:
    assert set(re.findall(r"`(\w+\.txt)`", README)) == {path.name for path in PROMPTS}
    rows = [line for line in README.splitlines() if line.startswith("|") and ".txt`" in line]
    for name in ["MS MARCO", *BEIR.split()]:
        assert sum(bool(re.search(rf"(?<![\w-]){name}(?![\w-])", row)) for row in rows) == 1, name
    assert len(README.splitlines()) <= 90

"""Tests of loading prompts from files: templates, the length filter, and several files in one set."""

import sys

import numpy as np
import pytest

from megatron_rlvr.data.prompts import PromptFile, Template, load_prompts
from megatron_rlvr.data.rows import DataError
from megatron_rlvr.data.tokenizer import load_tokenizer


def row(prompt, **columns):
    return {"prompt": prompt, "answer": "1", **columns}


def texts(prompt_set, tokenizer):
    return [tokenizer.decode(prompt.token_ids) for prompt in prompt_set.prompts]


def test_templates_chat_plain_and_auto_give_the_documented_texts(write_rows, word_tokenizer):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    file = PromptFile(write_rows("a.jsonl", [row("Q"), row(chat)]))
    as_chat = ["[user] Q now [assistant]", "[system] S [user] Q now [assistant]"]
    as_plain = ["Q now", "S Q now"]
    cases: list[tuple[bool, Template, list[str]]] = [
        (False, "auto", as_plain),
        (True, "auto", as_chat),
        (False, "chat", as_chat),
        (True, "plain", as_plain),
    ]
    for has_template, template, expected in cases:
        tokenizer = word_tokenizer(chat_template="t" if has_template else None)
        loaded = load_prompts([file], tokenizer, template=template, suffix=" now", max_prompt_tokens=99)
        assert texts(loaded, tokenizer) == expected


def test_plain_prompts_begin_with_the_start_tokens_and_chat_prompts_do_not(write_rows, word_tokenizer):
    file = PromptFile(write_rows("a.jsonl", [row("Q")]))
    tokenizer = word_tokenizer(start_ids=[1])
    assert texts(load_prompts([file], tokenizer, template="plain", max_prompt_tokens=99), tokenizer) == ["<start> Q"]
    assert texts(load_prompts([file], tokenizer, template="chat", max_prompt_tokens=99), tokenizer) == [
        "[user] Q [assistant]"
    ]


def test_a_system_message_is_first_and_a_second_one_is_an_error(write_rows, word_tokenizer):
    tokenizer = word_tokenizer(chat_template="t")
    file = PromptFile(write_rows("a.jsonl", [row("Q")]))
    loaded = load_prompts([file], tokenizer, system="S", max_prompt_tokens=99)
    assert texts(loaded, tokenizer) == ["[system] S [user] Q [assistant]"]
    own = PromptFile(
        write_rows("b.jsonl", [row([{"role": "system", "content": "T"}, {"role": "user", "content": "Q"}])])
    )
    with pytest.raises(DataError, match=r"prompt b/1 has its own system message; unset data\.system"):
        load_prompts([own], tokenizer, system="S", max_prompt_tokens=99)


def test_prompts_have_the_columns_of_their_row(write_rows, word_tokenizer):
    file = PromptFile(write_rows("a.jsonl", [row("one two", id=7, source="s", level=3)]))
    (prompt,) = load_prompts([file], word_tokenizer(), max_prompt_tokens=99).prompts
    assert (prompt.id, prompt.answer, prompt.source, prompt.extra) == ("a/7", "1", "s", {"level": 3})
    assert prompt.token_ids.dtype == np.int32
    assert prompt.token_ids.tolist() == [2, 3]


def test_prompts_over_the_limit_are_dropped_and_counted_and_one_at_the_limit_is_kept(write_rows, word_tokenizer):
    long_short = PromptFile(write_rows("a.jsonl", [row("one two three"), row("one two"), row("one")]))
    only_short = PromptFile(write_rows("b.jsonl", [row("one")]))
    loaded = load_prompts([long_short, only_short], word_tokenizer(), max_prompt_tokens=2)
    assert [prompt.id for prompt in loaded.prompts] == ["a/2", "a/3", "b/1"]
    assert [(file.name, file.start, file.count, file.weight, file.dropped_too_long) for file in loaded.files] == [
        ("a", 0, 2, 2.0, 1),
        ("b", 2, 1, 1.0, 0),
    ]
    assert (len(loaded), loaded.dropped_too_long) == (3, 1)


def test_start_tokens_count_toward_the_length(write_rows, word_tokenizer):
    file = PromptFile(write_rows("a.jsonl", [row("one two"), row("one")]))
    loaded = load_prompts([file], word_tokenizer(start_ids=[1]), max_prompt_tokens=2)
    assert [prompt.id for prompt in loaded.prompts] == ["a/2"]


def test_a_file_with_no_prompt_short_enough_is_an_error(write_rows, word_tokenizer):
    files = [
        PromptFile(write_rows("a.jsonl", [row("one")])),
        PromptFile(write_rows("b.jsonl", [row("1 2 3"), row("1 2 3 4")])),
    ]
    with pytest.raises(DataError, match=r"data\.max_prompt_tokens=2: all 2 prompts of .*b\.jsonl are longer; .* 3 or"):
        load_prompts(files, word_tokenizer(), max_prompt_tokens=2)


def test_equal_texts_are_tokenized_once_and_in_batches(write_rows, word_tokenizer):
    tokenizer = word_tokenizer()
    rows = [row(f"problem {i % 1500}") for i in range(4500)]
    loaded = load_prompts([PromptFile(write_rows("a.jsonl", rows))], tokenizer, max_prompt_tokens=99)
    assert tokenizer.batches == [1024, 476]
    assert texts(loaded, tokenizer)[3017] == "problem 17"
    first, second = loaded.prompts[17].token_ids, loaded.prompts[1517].token_ids
    assert first is second
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 5


def test_distinct_prompts_and_those_with_several_answers_are_counted_over_all_files(write_rows, word_tokenizer):
    rows = [{"prompt": f"problem {i % 5}", "answer": str(i % 5)} for i in range(15)]
    rows[7]["answer"] = "8"  # of problem 2
    files = [
        PromptFile(write_rows("a.jsonl", rows)),
        PromptFile(write_rows("b.jsonl", [row("problem 1"), row("problem 3"), row("new"), row("one two three four")])),
    ]
    loaded = load_prompts(files, word_tokenizer(), max_prompt_tokens=3)
    assert (len(loaded), loaded.distinct, loaded.ambiguous) == (18, 6, 2)


def test_a_digest_says_which_part_of_the_prompts_differs(write_rows, word_tokenizer):
    rows = [
        {"id": i, "prompt": f"problem {i}", "answer": str(i), "source": "s", "tests": [i], "level": 1} for i in range(9)
    ]

    tokenizer = word_tokenizer(chat_template="t")  # one for all, as it numbers words in order of appearance

    def digests(rows, **options):
        file = PromptFile(write_rows("a.jsonl", rows))
        (loaded,) = load_prompts([file], tokenizer, max_prompt_tokens=99, **options).files
        return loaded.digests

    def differing(rows, **options):
        found = digests(rows, **options)
        return {part for part in before if before[part] != found[part]}

    before = digests(rows)
    assert differing(rows) == set()
    assert differing([dict(reversed(each.items())) for each in rows]) == set()
    assert differing([{**rows[0], "answer": "-1"}, *rows[1:]]) == {"answers"}
    assert differing([{**rows[0], "tests": [0, 0]}, *rows[1:]]) == {"other columns"}
    assert differing([{**rows[0], "id": 77}, *rows[1:]]) == {"ids"}
    assert differing([{**rows[0], "source": "t"}, *rows[1:]]) == {"ids"}
    assert differing([{**rows[0], "prompt": "other"}, *rows[1:]]) == {"problems", "prompts"}
    assert differing([rows[1], rows[0], *rows[2:]]) == {"ids", "problems", "answers", "other columns", "prompts"}
    assert differing(rows, suffix=" now") == {"prompts"}


def test_an_invalid_list_of_files_is_refused_before_any_file_is_read(write_rows, tmp_path, word_tokenizer):
    path = write_rows("a.jsonl", [row("one")])
    cases = [
        ([], "no prompt files"),
        ([PromptFile(path), PromptFile(tmp_path / "other" / "a.parquet")], "are both named 'a'"),
        ([PromptFile(path, name="x/y")], "name 'x/y' is empty or contains a slash"),
        ([PromptFile(path, name="")], "name '' is empty or contains a slash"),
        ([PromptFile(path, weight=0)], "weight=0: .* must be finite and above 0"),
        ([PromptFile(path, weight=float("inf"))], "weight=inf: .* must be finite and above 0"),
    ]
    for files, message in cases:
        with pytest.raises(DataError, match=message):
            load_prompts(files, word_tokenizer(), max_prompt_tokens=99)
    with pytest.raises(DataError, match=r"data\.template=chatty: unknown template"):
        load_prompts([PromptFile(path)], word_tokenizer(), template="chatty", max_prompt_tokens=99)  # type: ignore[arg-type]


def test_two_files_of_one_stem_are_distinguished_by_name(write_rows, tmp_path, word_tokenizer):
    (tmp_path / "sub").mkdir()
    first, second = write_rows("a.jsonl", [row("one")]), write_rows("sub/a.jsonl", [row("two")])
    loaded = load_prompts([PromptFile(first), PromptFile(second, name="b")], word_tokenizer(), max_prompt_tokens=9)
    assert [(prompt.id, prompt.source) for prompt in loaded.prompts] == [("a/1", "a"), ("b/1", "b")]


def test_both_kinds_of_real_tokenizer_load_prompts(write_rows, hugging_face_folder, sentencepiece_folder):
    file = PromptFile(write_rows("a.jsonl", [row("What is one plus one?")]))
    tokenizer = load_tokenizer(hugging_face_folder)
    (prompt,) = load_prompts([file], tokenizer, max_prompt_tokens=99).prompts
    messages = [{"role": "user", "content": "What is one plus one?"}]
    assert prompt.token_ids.tolist() == tokenizer.apply_chat_template(messages)
    tokenizer = load_tokenizer(sentencepiece_folder)
    (prompt,) = load_prompts([file], tokenizer, max_prompt_tokens=99).prompts
    assert prompt.token_ids.tolist() == tokenizer.encode("What is one plus one?")


def test_an_error_names_the_row_that_the_template_rejects(write_rows, hugging_face_folder):
    file = PromptFile(write_rows("a.jsonl", [row("fine"), row([{"role": "judge", "content": "x"}])]))
    with pytest.raises(
        DataError, match=r"prompt a/2: the chat template in .* rejects the messages \(TemplateError: no"
    ):
        load_prompts([file], load_tokenizer(hugging_face_folder), max_prompt_tokens=99)


def test_progress_is_shown_only_on_a_terminal_and_only_if_enabled(write_rows, monkeypatch, capsys, word_tokenizer):
    file = PromptFile(write_rows("a.jsonl", [row("one")]))
    for terminal, enabled, shown in [(True, True, True), (True, False, False), (False, True, False)]:
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        load_prompts([file], word_tokenizer(), max_prompt_tokens=9, show_progress=enabled)
        captured = capsys.readouterr()
        assert ("tokenizing a" in captured.err) == shown
        assert captured.out == ""

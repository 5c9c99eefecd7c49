"""Tests of both kinds of tokenizer against each other and against the libraries that they wrap."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from megatron_rlvr.data.tokenizer import TokenizerError, load_tokenizer

TEXT = "What is two times three?"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]


def test_importing_cursor_and_tokenizer_imports_no_large_library():
    code = (
        "import sys, megatron_rlvr.data.cursor, megatron_rlvr.data.tokenizer;"
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'sentencepiece', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_hugging_face_ids_equal_those_of_the_tokenizers_library(hugging_face_folder):
    from tokenizers import Tokenizer

    oracle = Tokenizer.from_file(str(hugging_face_folder / "tokenizer.json"))
    tokenizer = load_tokenizer(hugging_face_folder)
    assert tokenizer.encode(TEXT) == oracle.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.encode_batch([TEXT, "", "one"]) == [tokenizer.encode(text) for text in (TEXT, "", "one")]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.vocab_size == oracle.get_vocab_size() == 300
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.start_ids) == (0, 2, [])


def test_sentencepiece_ids_equal_those_of_the_sentencepiece_library(sentencepiece_folder):
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    for path in (sentencepiece_folder, sentencepiece_folder / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode(TEXT) == oracle.encode(TEXT)
        assert tokenizer.encode_batch([TEXT, "", "one"]) == [oracle.encode(text) for text in (TEXT, "", "one")]
        assert tokenizer.encode_batch([]) == []
        assert tokenizer.vocab_size == 60
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.start_ids) == (2, 2, [])


def test_decoding_omits_special_tokens_and_ids_outside_the_vocabulary(hugging_face_folder, sentencepiece_folder):
    for folder in (hugging_face_folder, sentencepiece_folder):
        tokenizer = load_tokenizer(folder)
        ids = [1, *tokenizer.encode(TEXT), 2, tokenizer.vocab_size, 151_000]
        assert tokenizer.decode(ids) == TEXT
        assert tokenizer.decode(np.array(ids, dtype=np.int32)) == TEXT
        assert tokenizer.decode([]) == ""


def test_decoding_does_not_clean_up_spaces(hugging_face_folder, tmp_path, write_config):
    shutil.copytree(hugging_face_folder, tmp_path / "copy")
    # The second name is transformers' own switch for byte-pair tokenizers.
    names = ("clean_up_tokenization_spaces", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    write_config(tmp_path / "copy", eos_token="<|end|>", **dict.fromkeys(names, True))
    tokenizer = load_tokenizer(tmp_path / "copy")
    assert tokenizer.decode(tokenizer.encode("one , two .")) == "one , two ."


def test_the_chat_template_is_rendered_up_to_the_assistants_answer(hugging_face_folder):
    tokenizer = load_tokenizer(hugging_face_folder)
    config = json.loads((hugging_face_folder / "tokenizer_config.json").read_text())
    assert tokenizer.chat_template == config["chat_template"]
    start, end = [1], [2]
    expected = [
        *start, *tokenizer.encode("system\nBe brief."), *end, *tokenizer.encode("\n"),
        *start, *tokenizer.encode("user\n" + TEXT), *end, *tokenizer.encode("\n"),
        *start, *tokenizer.encode("assistant\n"),
    ]  # fmt: skip
    assert tokenizer.apply_chat_template(CHAT) == expected


def test_a_sentencepiece_model_renders_chats_in_a_plain_form(sentencepiece_folder):
    tokenizer = load_tokenizer(sentencepiece_folder)
    text = f"System: Be brief.\n\nUser: {TEXT}\n\nAssistant:"
    assert tokenizer.chat_template is None
    assert next(tokenizer.render_chats([CHAT])) == text
    assert tokenizer.apply_chat_template(CHAT) == tokenizer.encode(text)


def test_a_saved_tokenizer_is_loaded_unchanged(hugging_face_folder, sentencepiece_folder, tmp_path):
    for folder in (hugging_face_folder, sentencepiece_folder):
        tokenizer = load_tokenizer(folder)
        tokenizer.save(tmp_path / "new" / folder.name)
        again = load_tokenizer(tmp_path / "new" / folder.name)
        assert type(again) is type(tokenizer)
        assert again.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)
        assert (again.vocab_size, again.eos_token_id, again.pad_token_id, again.chat_template) == (
            tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template,
        )  # fmt: skip


def test_a_sentencepiece_model_with_a_config_is_loaded_by_transformers_with_its_start_tokens(
    sentencepiece_bpe_folder, tmp_path, write_config
):
    shutil.copy(sentencepiece_bpe_folder / "tokenizer.model", tmp_path)
    write_config(tmp_path, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", add_bos_token=True)
    tokenizer, bare = load_tokenizer(tmp_path), load_tokenizer(sentencepiece_bpe_folder)
    assert (tokenizer.start_ids, bare.start_ids) == ([1], [])
    for text in (TEXT, "new\nline and caf\u00e9", "\\boxed{12}"):
        assert tokenizer.encode(text) == bare.encode(text)
        assert tokenizer.decode(bare.encode(text)) == bare.decode(bare.encode(text)) == text


def test_a_token_added_at_the_end_is_not_a_start_token(hugging_face_folder, tmp_path):
    shutil.copytree(hugging_face_folder, tmp_path / "copy")
    definition = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [2], "tokens": ["<|end|>"]}},
    }
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(tmp_path / "copy")
    assert tokenizer.start_ids == []
    assert tokenizer.encode("one")[-1] != 2


def test_without_a_padding_token_the_end_of_sequence_token_is_used(hugging_face_folder, tmp_path, write_config):
    shutil.copytree(hugging_face_folder, tmp_path / "copy")
    write_config(tmp_path / "copy", eos_token="<|end|>")
    tokenizer = load_tokenizer(tmp_path / "copy")
    assert tokenizer.pad_token_id == 2
    assert tokenizer.chat_template is None
    with pytest.raises(TokenizerError, match=r"no chat template; set data\.template=plain"):
        next(tokenizer.render_chats([CHAT]))


def test_the_reason_of_a_template_that_rejects_messages_is_in_the_error(hugging_face_folder):
    with pytest.raises(TokenizerError, match=r"rejects the messages \(TemplateError: no judge here\)"):
        next(load_tokenizer(hugging_face_folder).render_chats([[{"role": "judge", "content": "x"}]]))


def test_errors_about_unusable_tokenizers_name_the_problem(hugging_face_folder, no_eos_folder, tmp_path, write_config):
    for name in ("empty", "no_eos", "no_vocabulary", "broken", "not_a_model", "no_eos_piece"):
        (tmp_path / name).mkdir()
    shutil.copy(hugging_face_folder / "tokenizer.json", tmp_path / "no_eos")
    write_config(tmp_path / "no_vocabulary", tokenizer_class="LlamaTokenizer", eos_token="</s>")
    (tmp_path / "broken" / "tokenizer.json").write_text('{"a": 1')
    (tmp_path / "not_a_model" / "tokenizer.model").write_text("text")
    shutil.copy(no_eos_folder / "tokenizer.model", tmp_path / "no_eos_piece")
    (tmp_path / "vocab.txt").write_text("a\n")
    cases = {
        "nowhere": "is not a folder on this machine",
        "vocab.txt": "is not a sentencepiece .model file",
        "empty": "has no tokenizer.json, tokenizer_config.json or tokenizer.model",
        "no_eos": "has no eos_token; set it in tokenizer_config.json",
        "no_vocabulary": "has no vocabulary",
        "broken": "cannot be read",
        "not_a_model": "cannot be read as a sentencepiece model",
        "no_eos_piece": "has no eos_id",
    }
    for name, message in cases.items():
        with pytest.raises(TokenizerError, match=message) as raised:
            load_tokenizer(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_config_that_transformers_rejects_is_not_blamed_on_the_tokenizer(hugging_face_folder, tmp_path):
    folder = shutil.copytree(hugging_face_folder, tmp_path / "model")
    config = {"model_type": "qwen3", "num_hidden_layers": 3, "layer_types": ["full_attention"] * 2}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        TokenizerError, match=r"model/config\.json cannot be read by .*num_hidden_layers.*; copy"
    ) as raised:
        load_tokenizer(folder)
    assert "\n" not in str(raised.value)

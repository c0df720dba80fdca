"""Writes golden/tokenizer_*.json: small tokenizers of the families, and what transformers makes of texts and chats.

    python tests/interop/make_golden_tokenizers.py

Run by hand where transformers and tokenizers are installed; the tests need only what it writes.
"""

import json
import pydoc_data.topics
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

GOLDEN = Path(__file__).parent / "golden"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "", " ", "a", "Hello, world!", " leading and  double", "line\nline\n\n\tend \n", "don't we'll IT'S", "12345 6.78",
    "caf\u00e9 \u4f60\u597d \U0001f600 \u2581x", "\x00 \r\n",
    "<|im_end|> and </s> and <eot>", "<tool_call>{}</tool_call>",
    "def f(x):\n    return x ** 2\n", "The value of the expression is not an object of that type.",
]  # fmt: skip
USER, ANSWER = {"role": "user", "content": "Add 2 and 3,\n\nplease."}, {"role": "assistant", "content": "It is 5."}
SURE = {"role": "assistant", "content": "Yes \U0001f600!"}
CALL = {"name": "add", "arguments": {"x": 2, "text": "\u00e9 <b>"}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
CHATS = {
    "one": ([USER, ANSWER], []),
    "asked": ([USER], []),
    "two": ([USER, ANSWER, {"role": "user", "content": "Sure?"}, SURE], []),
    "system": ([{"role": "system", "content": "Be brief."}, USER, ANSWER], []),
    "tools": (
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "5"},
            ANSWER,
        ],
        TOOLS,
    ),
}
CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{% generation %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n' if message.content else '' }}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
INST = """{% if messages[0]['role'] == 'system' %}
{% set messages = messages[1:] %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}
{% set system = '' %}
{% endif %}
{% for message in messages %}
{% if message['role'] == 'tool' or message['tool_calls'] is defined %}
{{ raise_exception('this model calls no tools') }}
{% elif message['role'] == 'user' %}
{{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'].strip() + ' ' + eos_token }}
{%- endif %}
{% endfor %}"""
HEADER = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'tool' or message.tool_calls is defined %}
{{ raise_exception('no tools here') }}
{%- endif %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
TURNS = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}
{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}
{%- endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


def trained(tokenizer: Tokenizer, special: list[str], vocab_size: int, alphabet=()) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:30], trainer)
    return tokenizer


def bytes_like(split, *, normalizer=None, ignore_merges=False, vocab_size=420) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return trained(tokenizer, [], vocab_size, pre_tokenizers.ByteLevel.alphabet())


def sentencepiece_like(special, *, normalizer=None, pre_tokenizer=None, strip=0, vocab_size=620) -> Tokenizer:
    """Trained with U+2581 for blanks, the control tokens and the 256 bytes first."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    # Words are cut only to train: the definition has no such step.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained(tokenizer, [*special, *(f"<0x{byte:02X}>" for byte in range(256))], vocab_size)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [entry for entry in values["added_tokens"] if entry["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", strip, 0)] * bool(strip))
    return tokenizer


def opened(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """With a token before each text."""
    around = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = around
    return tokenizer


def qwen():
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer = bytes_like([split], normalizer=normalizers.NFC())
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("<tool_call>", "</tool_call>", "<think>")])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    return tokenizer, names, CHATML, ["<|im_end|>", "<|endoftext|>"]


def smollm2():
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = bytes_like([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    values = json.loads(tokenizer.to_str())
    values["pre_tokenizer"]["pretokenizers"].pop()  # one step of bytes is enough
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    names |= {"bos_token": "<|im_start|>", "unk_token": "<|endoftext|>"}
    return tokenizer, names, CHATML, "<|im_end|>"


def llama3():
    tokenizer = bytes_like([pre_tokenizers.Split(Regex(SPLIT), "isolated")], ignore_merges=True)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(special)
    names = {"bos_token": special[0], "eos_token": "<|eot_id|>"}
    return opened(tokenizer, special[0]), names, HEADER, ["<|end_of_text|>", "<|eot_id|>"]


def llama2():
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = sentencepiece_like(["<unk>", "<s>", "</s>"], normalizer=normalizer, strip=1)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return opened(tokenizer, "<s>"), names, INST, "</s>"


def mistral():
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = sentencepiece_like(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], pre_tokenizer=metaspace, strip=1)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return opened(tokenizer, "<s>"), names, INST, "</s>"


def gemma():
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = sentencepiece_like(special, normalizer=normalizers.Replace(" ", "\u2581"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return opened(tokenizer, "<bos>"), names, TURNS, ["<eos>", "<end_of_turn>"]


def files(tokenizer: Tokenizer, names: dict, template: str, ends) -> dict:
    """A folder's files by name."""
    id = tokenizer.token_to_id
    stops = [id(end) for end in ends] if isinstance(ends, list) else id(ends)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    return {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": config,
        "generation_config.json": {"eos_token_id": stops},
        "chat_template.jinja": template,
    }


def golden(tokenizer: Tokenizer, names: dict, template: str, ends) -> dict:
    written = files(tokenizer, names, template, ends)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in written.items():
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (Path(folder) / name).write_text(text, encoding="utf-8")
        theirs = AutoTokenizer.from_pretrained(folder)
    texts = [
        {
            "text": text,
            "ids": theirs.encode(text, add_special_tokens=False, split_special_tokens=True),
            "opened": theirs.encode(text, split_special_tokens=True),
        }
        for text in TEXTS
    ]
    for each in texts:
        each["decoded"] = theirs.decode(each["ids"])
    return {"files": written, "texts": texts, "chats": {name: chat(theirs, *CHATS[name]) for name in CHATS}}


def chat(theirs, messages: list, tools: list) -> dict:
    wrapped = [
        {**each, "tool_calls": [{"type": "function", "function": call} for call in each["tool_calls"]]}
        if "tool_calls" in each
        else each
        for each in messages
    ]
    asked = messages[-1]["role"] != "assistant"
    try:
        how = dict(tools=tools or None, add_generation_prompt=asked, tokenize=True, return_dict=False)
        ids = theirs.apply_chat_template(wrapped, **how)
    except Exception as error:
        return {"messages": messages, "tools": tools, "refused": str(error)}
    return {"messages": messages, "tools": tools, "ids": ids}


def main():
    for make in (qwen, smollm2, llama3, llama2, mistral, gemma):
        path = GOLDEN / f"tokenizer_{make.__name__}.json"
        path.write_text(json.dumps(golden(*make()), ensure_ascii=False) + "\n", encoding="utf-8")
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()

"""The special tokens: the same ids in every tokenizer, reserved from the start so that no stage resizes an embedding.

Text never produces them: they are added by id, by the code that knows that a document starts or a turn ends.
"""

PAD, UNK, BOS, EOS = "<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>"  # a document is BOS, its text, EOS
SYSTEM, USER, ASSISTANT, TOOL = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"  # who speaks in a turn
END = "<|end|>"  # end of a turn
TOOLS, TOOL_CALL = "<|tools|>", "<|tool_call|>"
THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"

NUM_SPECIAL_TOKENS = 32
_NAMED = (PAD, UNK, BOS, EOS, SYSTEM, USER, ASSISTANT, TOOL, END, TOOLS, TOOL_CALL,
          THINK, END_THINK, ANSWER, END_ANSWER)  # fmt: skip
SPECIAL_TOKENS = _NAMED + tuple(f"<|reserved_{i}|>" for i in range(NUM_SPECIAL_TOKENS - len(_NAMED)))

IDS = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
PAD_ID, UNK_ID, BOS_ID, EOS_ID = (IDS[token] for token in (PAD, UNK, BOS, EOS))
END_ID = IDS[END]

from jaxllm.text import special_tokens as special


def test_the_ids_of_the_special_tokens_never_change():
    names = "pad unk bos eos system user assistant tool end tools tool_call".split()
    chat = [f"<|{name}|>" for name in names] + ["<think>", "</think>", "<answer>", "</answer>"]
    assert list(special.SPECIAL_TOKENS) == chat + [f"<|reserved_{i}|>" for i in range(17)]
    assert (special.PAD_ID, special.UNK_ID, special.BOS_ID, special.EOS_ID, special.END_ID) == (0, 1, 2, 3, 8)
    assert len(set(special.SPECIAL_TOKENS)) == special.NUM_SPECIAL_TOKENS == 32

from jaxllm.text import verdicts
from jaxllm.text.chat import Conversation


def test_a_comparison_shows_the_conversation_and_both_answers_in_their_order_and_asks_last():
    said = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Who?\n\nMe?"))
    prompt = Conversation(tuple({"role": role, "content": content} for role, content in said))
    (message,) = verdicts.comparison(prompt, "one", "two").messages
    assert message == {
        "role": "user",
        "content": "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Who?\n\nMe?\n\nA: one\n\nB: two\n\n"
        "Which answer is better, A or B?",
    }
    (other,) = verdicts.comparison(prompt, "two", "one").messages
    assert other["content"] == message["content"].replace("A: one\n\nB: two", "A: two\n\nB: one")

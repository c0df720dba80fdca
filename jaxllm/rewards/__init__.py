"""What an answer is worth by a rule: functions of a prompt, a completion and a record, which need no model."""

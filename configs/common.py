"""Every key of a run with its default. A run's own file changes what differs; unknown keys are errors."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The default run: pretraining of a small Llama on the English prose that every Python carries."""
    config = ml_collections.ConfigDict()
    config.stage = "pretrain"  # which objective and batches: a key of jaxllm/stages.py
    config.seed = 0  # everything random derives from it: initialisation, dropout, order of the data

    config.start = ""  # run to start from: its newest parameters, tokenizer and architecture; "" starts at random
    config.teacher = ""  # run whose newest parameters the stage "distill" learns from
    config.reference = ""  # run that the stage "preference" compares with; "" takes start

    config.tokenizer = ml_collections.ConfigDict()
    config.tokenizer.kind = "sentencepiece"  # BPE with byte fallback, learned from the run's own text | "bytes"
    config.tokenizer.vocab_size = 4096  # of a sentencepiece tokenizer that is learned; bytes have 288
    config.tokenizer.path = ""  # a saved tokenizer to use instead

    config.data = ml_collections.ConfigDict()
    config.data.sources = ml_collections.ConfigDict()  # name -> source; batches mix them by weight
    config.data.sources.main = source()
    config.data.stage_steps = (0,)  # the step from which each entry of the sources' weights holds
    config.data.sequence_length = 256  # tokens per row
    config.data.packing = (
        "concatenated"  # every row full | "best_fit" | "best_fit_whole": drops what is longer than a row
    )
    config.data.validation = 0.05  # share held out
    config.data.split = "document"  # "document": by hash of its content | "tail": the end of the text
    config.data.cache = ""  # directory of tokenised text, shared between runs; "" keeps it in the run directory
    config.data.workers = 0  # processes that prepare batches; 0 prepares them in a thread of this one
    config.data.prefetch = 4  # batches prepared ahead
    config.data.shuffle_seed = 0  # order of the rows

    config.model = llama(
        vocab_size=4096, num_layers=4, width=256, num_heads=4, num_kv_heads=2, head_width=64, mlp_width=704
    )

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"  # "adamw" | "muon" (AdamW for what is not a matrix) | "adafactor"
    config.optimizer.learning_rate = 1e-3  # peak
    config.optimizer.schedule = "cosine"  # "cosine" | "linear" | "wsd" (warm up, stay, decay) | "constant"
    config.optimizer.warmup = 100  # of warmup_unit
    config.optimizer.warmup_unit = "steps"  # "steps" | "tokens"
    config.optimizer.final_fraction = 0.1  # of the peak at the last step
    config.optimizer.decay_fraction = 0.2  # share of the steps that "wsd" decays over
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.1  # decoupled, times the learning rate
    config.optimizer.decay_mask = "kernel|table"  # regular expression of the parameters that decay
    config.optimizer.freeze_mask = ""  # regular expression of the parameters that stay as they are
    config.optimizer.clip_norm = 1.0  # global gradient norm; 0 never clips
    config.optimizer.spike_deviations = 0.0  # skip updates so many deviations above the recent mean; 0 skips none
    config.optimizer.ema_decay = 0.0  # of an average of the parameters kept beside them; 0 keeps none

    config.objective = ml_collections.ConfigDict()
    config.objective.z_coef = 0.0  # z-loss coefficient; PaLM has 1e-4
    config.objective.neftune_alpha = 0.0  # noise on the embeddings in training, alpha / sqrt(L D); NEFTune has 5 to 15
    config.objective.beta = 0.0  # of a teacher's divergence: 0 is forward KL, 1 reverse KL, between them is JSD
    config.objective.temperature = 1.0  # divides the logits of student and teacher before they are compared
    config.objective.hard_weight = 0.5  # share of the cross-entropy with the data; 0 learns from the teacher alone
    config.objective.student_fraction = 0.0  # of a distillation's steps, on answers that the student itself samples
    config.objective.top_k = 0  # likeliest tokens that a teacher's distribution is cut to, the others one; 0 keeps all
    config.objective.store_teacher = False  # ask the teacher once, before training; its top_k lie beside the tokens

    config.preference = ml_collections.ConfigDict()
    config.preference.loss = "dpo"  # | "robust_dpo" | "ipo" | "hinge" | "orpo" | "simpo" | "kto"
    config.preference.beta = 0.1  # of the log-ratios: larger stays nearer to the reference; ORPO's lambda
    config.preference.label_smoothing = 0.0  # share of the labels thought to be flipped, of "dpo" and "robust_dpo"
    config.preference.gamma = 0.5  # margin by which "simpo" wants an answer to win
    config.preference.length_normalised = False  # compare means over an answer's tokens, as "orpo" and "simpo" do
    config.preference.sft_weight = 0.0  # of the chosen answers' cross-entropy beside the loss; "orpo" needs it, with 1
    config.preference.desirable_weight = 1.0  # of answers that people liked, of "kto"
    config.preference.undesirable_weight = 1.0  # of those that they did not like
    config.preference.store_reference = False  # ask the reference once, before training; half of the memory

    config.reward = ml_collections.ConfigDict()
    config.reward.pair_weight = 1.0  # of the Bradley-Terry loss of pairs
    config.reward.score_weight = 0.0  # of the squared error of scores
    config.reward.centering = 0.0  # draws the sum of a pair's rewards to 0; 0.01 is common
    config.reward.margin = 0.0  # times the pair's margin, by which its chosen answer should win; Llama 2 has 1

    config.policy = ml_collections.ConfigDict()  # reinforcement learning: configs/rl.py has the algorithms by name
    config.policy.advantage = (
        "group"  # GRPO | "group_mean" | "leave_one_out" | "batch" | "gae": a critic | "token": each token's own reward
    )
    config.policy.ratio = "token"  # of new to old probability: of each token | "sequence": of a completion's mean
    config.policy.surrogate = "clip"  # the ratio, as PPO does | "cispo": its weight alone | "reinforce": no ratio
    config.policy.weights = "token"  # all tokens alike | "sequence": all completions | "constant": a full one's tokens
    config.policy.clip_low = 0.2  # the ratio stays above 1 - clip_low
    config.policy.clip_high = 0.2  # and below 1 + clip_high
    config.policy.importance_cap = 2.0  # of trainer's over sampler's probability of a token; 0 corrects nothing
    config.policy.kl = "k3"  # estimator of the KL in the loss: "k2" | "k3" | "k1", which is only watched
    config.policy.kl_loss = 0.0  # coefficient of the KL in the loss
    config.policy.kl_reward = 0.0  # of each token's log-ratio in its reward; with "token", 1 distills the reference
    config.policy.kl_target = 0.0  # nats of a completion that kl_reward is adapted to; 0 keeps it as it is
    config.policy.kl_horizon = 10_000  # completions that kl_reward adapts over
    config.policy.entropy = 0.0  # coefficient of the policy's entropy, which is raised
    config.policy.whiten = False  # advantages to mean 0 and variance 1 over all tokens of a rollout
    config.policy.gamma = 1.0  # what a token later is worth now, of "gae"
    config.policy.lam = 0.95  # of "gae": 1 trusts the rewards alone, 0 the critic
    config.policy.value_weight = 0.5  # of the critic's loss, which is a squared error's half
    config.policy.value_clip = 0.2  # how far a value moves from its old one before its loss stops; 0 does not clip
    config.policy.epochs = 1  # how often a rollout is learned from; "reinforce" takes 1
    config.policy.minibatches = 1  # updates of each epoch: a rollout has minibatches x loop.batch_size completions

    config.rollout = ml_collections.ConfigDict()
    config.rollout.sources = ml_collections.ConfigDict()  # name -> problem()
    config.rollout.rewards = ml_collections.ConfigDict()  # name -> reward(); their weighted sum is learned
    config.rollout.completions = 8  # of each prompt
    config.rollout.max_prompt_tokens = 64  # longer prompts are not asked
    config.rollout.max_new_tokens = 64  # of a completion, in all its turns
    config.rollout.temperature = 1.0  # divides the logits, of sampler and trainer
    config.rollout.validation_temperature = 0.0  # at which held-out problems are answered; 0 is greedy
    config.rollout.slots = 0  # completions sampled side by side; one that ends makes room for another; 0 is all
    config.rollout.refill_rounds = 0  # how often groups of equal rewards are replaced by other problems'; DAPO
    config.rollout.tools = ()  # "calculator"
    config.rollout.turns = 1  # of the model in a completion; a tool's answers lie between
    config.rollout.workers = 0  # processes that count rewards; 0 counts them in this one
    config.rollout.time_limit = 5.0  # seconds for the rewards of a completion, where there are workers
    config.rollout.shown = 2  # problems of a rollout whose completions a sample shows

    config.mesh = ml_collections.ConfigDict()
    config.mesh.replica = 1  # whole copies of the parameters
    config.mesh.fsdp = -1  # shards of parameters and batch; -1 takes the devices that are left
    config.mesh.tensor = 1  # shards of heads, mlp and vocabulary

    config.loop = ml_collections.ConfigDict()
    config.loop.steps = 300  # optimizer updates; 0 saves the model as it begins
    config.loop.batch_size = 16  # sequences per update, over all processes
    config.loop.micro_batches = 4  # parts that a batch is cut into; gradients add up
    config.loop.log_every = 10  # steps between rows of metrics.jsonl
    config.loop.evaluate_every = 100  # steps between validations; the last step always validates
    config.loop.evaluate_first = False  # validate before the first step too
    config.loop.evaluate_batches = 0  # at most so many validation batches of each source; 0 takes all
    config.loop.evaluate_answers = 0  # held-out prompts answered at each validation, for ROUGE-L; 0 answers none
    config.loop.sample_every = 100  # steps between text samples; 0 never samples
    config.loop.sample_prompts = ("The ", "This function returns")
    config.loop.sample_tokens = 48  # new tokens per sample and answer, at most
    config.loop.save_every = 100  # steps between checkpoints; the last step always saves
    config.loop.keep_last = 2  # checkpoints
    config.loop.keep_best = 1  # further checkpoints with the best best_metric
    config.loop.best_metric = "validation_loss"  # of a validation; "validation_loss/NAME" is a single source's
    config.loop.best_mode = "min"  # the lowest is best | "max": the highest
    config.loop.tensorboard = False  # write TensorBoard events too
    return config


def tiny(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same run in miniature, for tests: bytes, two narrow layers, twenty updates, seconds."""
    config.tokenizer.kind = "bytes"
    config.model = llama(num_layers=2, width=64, mlp_width=128, num_heads=4, num_kv_heads=2, head_width=16)
    config.data.sequence_length = 64
    config.optimizer.warmup = 5
    config.loop.update(steps=20, batch_size=8, micro_batches=2, log_every=5, evaluate_every=10, save_every=10)
    config.loop.update(evaluate_batches=4, sample_every=20, sample_tokens=16)
    return config


def no_argument(file: str, arg: str) -> None:
    """Refuses an argument of a config file that is neither empty nor "tiny"."""
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/{file}.py takes no argument, or 'tiny', not {arg!r}")


def source(
    path: str = "embedded", *, weights: tuple = (1.0,), format: str = "text", packing: str = ""
) -> ml_collections.ConfigDict:
    """One source of documents, texts or conversations, with its weight in the mixture at each stage."""
    source = ml_collections.ConfigDict()
    source.path = path  # file, folder, glob: .txt, .json, .jsonl(.gz, .zst), .parquet; "embedded": what Python carries
    source.field = "text"  # of a record of format "text"
    source.weights = weights  # one per entry of data.stage_steps
    source.validation_path = ""  # files held out; "" splits them off path
    source.format = format  # "text" | chats: "auto", "messages", "alpaca", "sharegpt", "prompt_response" | "preference"
    source.turns = "all"  # supervised answers of a conversation | "last"
    source.pairs = "all"  # of a list of scored answers: all that differ in score | "best_worst"
    source.answers = "paired"  # of preferences | "alone": each beside an answer to another prompt (KTO) | "chosen": SFT
    source.response_only = False  # response tuning: train on answers without what they answer
    source.on_error = "raise"  # at a bad record | "skip": leave it out and count it
    source.packing = packing  # as data.packing, which "" takes; conversations need "best_fit_whole" or "_truncated"
    source.tag = ""  # field whose values divide the source into tasks
    source.balance = 1.0  # share of a task ~ its rows ** balance; 0 makes tasks equal
    source.select = "all"  # training documents | "longest" | "random" | "diverse" | "highest" | "lowest" score_field
    source.keep = 0.0  # how many of them, or which share below 1; 0 with "all"
    source.score_field = ""  # number of a record, such as its perplexity
    source.select_seed = 0  # decides which are random
    return source


def problem(
    kind: str, *, weight: float = 1.0, level: int = 1, path: str = "", name: str = "", system: str = ""
) -> ml_collections.ConfigDict:
    """One source of problems that reinforcement learning asks, with its share of them."""
    source = ml_collections.ConfigDict()
    source.kind = kind  # a task: "addition", "counting", "countdown", ... | "file" | "reasoning_gym", the package
    source.weight = weight  # its share, relative to the other sources'
    source.level = level  # how hard a task is, from 1
    source.path = path  # of a "file": records of a prompt and, for what is checked, an answer
    source.name = name  # of "reasoning_gym": which of its data sets
    source.answer = ""  # field of a file that holds the answer; "" takes "answer" or "solution"
    source.checker = ""  # of a file's answers: "numeric", "exact", "math"; "" lets the answer tell
    source.on_error = "raise"  # at a bad record of a file | "skip": leave it out and count it
    source.system = system  # what the system says before each prompt; "think" asks for the format of answers
    return source


def reward(
    kind: str, *, weight: float = 1.0, path: str = "", limit: int = 0, buffer: int = 0
) -> ml_collections.ConfigDict:
    """One part of what a completion is worth."""
    reward = ml_collections.ConfigDict()
    reward.kind = kind  # a rule: "accuracy", "format", "overlong", "style", ... | "model", "judge": a run's opinion
    reward.weight = weight  # 0: it is only watched
    reward.path = path  # run directory of a "model", several with commas between; of a "judge" its name
    reward.limit = limit  # tokens, of "length" and "overlong"; 0 is rollout.max_new_tokens
    reward.buffer = buffer  # tokens before the limit over which "overlong" falls
    return reward


def llama(**sizes) -> ml_collections.ConfigDict:
    """A Llama-style decoder with these sizes: the plain case of every architecture key."""
    model = ml_collections.ConfigDict()
    model.vocab_size = 0  # 0 takes the tokenizer's
    model.num_layers = 0
    model.width = 0
    model.mlp_width = 0
    model.num_heads = 0
    model.num_kv_heads = 0  # key and value heads, shared by groups of query heads
    model.head_width = 0
    model.activation = "silu"  # of the mlp's gate: "silu" | "gelu" | "gelu_tanh"
    model.norm_eps = 1e-5
    model.norm_offset = 0.0  # Gemma: 1.0, scales are 1 + parameter
    model.pre_norm = True  # a norm before attention and mlp
    model.post_norm = False  # a norm after them, before the residual sum
    model.qk_norm = "none"  # "none" | "head" (per head: Qwen 3, Gemma 3) | "all" (over all heads: OLMo 2)
    model.qkv_bias = False  # Qwen 2: True
    model.output_bias = False
    model.mlp_bias = False
    model.tied_head = True  # the embedding's transpose is the head
    model.scalar_head = False  # a number per position beside the logits: a reward, a value
    model.critic = False  # that head stands on a second decoder, which starts as a copy of the first
    model.embedding_scale = 1.0  # Gemma: sqrt(width)
    model.attention_scale = 0.0  # 0 is 1 / sqrt(head_width)
    model.attention_soft_cap = 0.0  # Gemma 2: 50; 0 caps nothing
    model.logit_soft_cap = 0.0  # Gemma 2: 30
    model.layer_pattern = ("global",)  # repeated | "local": sliding window | "nope": without RoPE | "local_nope"
    model.sliding_window = 0  # keys that a local layer sees, itself included
    model.dropout = 0.0  # on the two residual branches of a block
    model.rope = ml_collections.ConfigDict()
    model.rope.theta = 10000.0
    model.rope.local_theta = 0.0  # Gemma 3: 10000 in local layers; 0 is theta
    model.rope.scaling = "none"  # "none" | "linear" | "llama3" | "yarn"
    model.rope.factor = 1.0
    model.rope.original_length = 0
    model.rope.low_frequency = 1.0
    model.rope.high_frequency = 4.0
    model.activation_dtype = "float32"  # between the products; "bfloat16" on accelerators
    model.operand_dtype = "bfloat16"  # of what is multiplied; sums, parameters and their gradients stay float32
    model.attention = "einsum"  # "einsum" | "dot_product" (JAX's own)
    model.remat = "none"  # made again in the backward pass: nothing | "full": blocks | "projections": all but products
    model.unroll = 0  # layers per iteration of the scan: more run faster and compile slower; 0 is all
    model.loss_chunk = 128  # positions whose logits exist at a time
    model.update(sizes)
    return model

"""The words of distributed LLM serving, each with the one answer that the shipped model gives.

Answers are plain sentences of at most 200 characters, so that a model of a few MB knows them all by heart.
"""

from dataclasses import dataclass

ARTICLES = ("a", "an", "the")


@dataclass(frozen=True, slots=True)
class Entry:
    """A subject as it stands in a question, with its article if it has one, and what to say about it."""

    subject: str
    answer: str

    @property
    def term(self) -> str:
        """The subject without its article."""
        first, _, rest = self.subject.partition(" ")
        return rest if first in ARTICLES else self.subject


GLOSSARY = (
    Entry(
        "prefill",
        "Prefill runs the whole prompt through the model in parallel and fills its KV cache. It is "
        "limited by compute and ends with the first token.",
    ),
    Entry(
        "decode",
        "Decode makes the answer one token at a time, reading all weights and the KV cache at each step. "
        "It is limited by memory bandwidth.",
    ),
    Entry(
        "a KV cache",
        "A KV cache keeps the keys and values of all earlier tokens, so that each new token attends to "
        "them without computing them again.",
    ),
    Entry(
        "TTFT",
        "TTFT is the time to first token: from the arrival of a request until its first token is out. "
        "Queueing and prefill set it.",
    ),
    Entry(
        "TPOT",
        "TPOT is the time per output token: the mean time between two tokens of an answer after the first "
        "one.",
    ),
    Entry(
        "goodput",
        "Goodput is the rate of requests that were served within their latency goals. Late answers count "
        "for throughput but not for goodput.",
    ),
    Entry(
        "throughput",
        "Throughput is the number of requests or tokens that a system finishes per second, however long "
        "each of them took.",
    ),
    Entry("latency", "Latency is the time that one request or one message takes from start to end."),
    Entry(
        "an SLO",
        "An SLO is a service level objective: a goal such as a TTFT under one second for 99 percent of "
        "all requests.",
    ),
    Entry(
        "a prompt",
        "A prompt is the text that a request brings. The model reads it in prefill and continues it in "
        "decode.",
    ),
    Entry(
        "a token",
        "A token is a piece of text with a number: the unit that a language model reads and writes.",
    ),
    Entry(
        "a tokenizer",
        "A tokenizer turns text into token numbers and back. Each model must be used with the tokenizer "
        "of its training.",
    ),
    Entry(
        "BPE",
        "BPE is byte pair encoding: it builds a vocabulary by merging the most frequent pair of symbols "
        "again and again.",
    ),
    Entry(
        "a chat template",
        "A chat template writes the messages of a conversation as one prompt, with markers for system, "
        "user and assistant.",
    ),
    Entry(
        "a context window",
        "A context window is the largest number of tokens, prompt and answer together, that a model can "
        "attend to.",
    ),
    Entry(
        "streaming",
        "Streaming sends each token to the client as soon as it is sampled, instead of waiting for the "
        "whole answer.",
    ),
    Entry(
        "sampling",
        "Sampling draws the next token from the probabilities that the model gives. Temperature, top-k "
        "and top-p shape the draw.",
    ),
    Entry(
        "greedy decoding",
        "Greedy decoding always takes the most likely next token, so the same prompt gives the same answer.",
    ),
    Entry(
        "temperature",
        "Temperature divides the logits before sampling: below one the draw is sharper, above one it is "
        "flatter.",
    ),
    Entry(
        "top-p",
        "Top-p sampling keeps the smallest set of most likely tokens whose probabilities sum to p, and "
        "draws from it.",
    ),
    Entry(
        "logits",
        "Logits are the raw scores that the last layer gives to each token of the vocabulary. Softmax "
        "turns them into probabilities.",
    ),
    Entry(
        "softmax",
        "Softmax turns scores into probabilities: it takes the exponential of each and divides by the sum.",
    ),
    Entry(
        "speculative decoding",
        "In speculative decoding a cheap draft proposes several tokens and the large model checks them "
        "all in one step.",
    ),
    Entry(
        "a batch",
        "A batch is a set of sequences that go through the model in one step, so that weights are read "
        "once for all of them.",
    ),
    Entry(
        "continuous batching",
        "Continuous batching lets sequences join and leave the batch at every step, so no request waits "
        "for the longest one.",
    ),
    Entry(
        "chunked prefill",
        "Chunked prefill cuts a long prompt into pieces and runs them beside decode steps, so that others "
        "need not wait for it.",
    ),
    Entry(
        "a micro-batch",
        "A micro-batch is a part of the batch that moves through the pipeline by itself. Several in "
        "flight keep all stages busy.",
    ),
    Entry(
        "paged attention",
        "Paged attention keeps the KV cache in blocks of fixed size that need not be adjacent, so little "
        "memory is wasted.",
    ),
    Entry(
        "a block table",
        "A block table lists, for one sequence, the cache blocks that hold its keys and values, in order.",
    ),
    Entry(
        "a prefix cache",
        "A prefix cache keeps the KV blocks of earlier prompts, so that a prompt with the same beginning "
        "skips that part of prefill.",
    ),
    Entry(
        "preemption",
        "Preemption stops a running sequence when cache blocks run out. Its blocks are freed and it is "
        "computed again later.",
    ),
    Entry(
        "admission control",
        "Admission control refuses or delays a request when there is no room for it, so that accepted "
        "requests keep their speed.",
    ),
    Entry(
        "backpressure",
        "Backpressure is a full receiver slowing its sender down, so that queues stay short.",
    ),
    Entry(
        "a transformer",
        "A transformer is a neural network of layers that mix attention over all tokens with a feed-"
        "forward network for each token.",
    ),
    Entry(
        "attention",
        "Attention compares the query of a token with the keys of earlier tokens and takes the mean of "
        "their values by these weights.",
    ),
    Entry(
        "GQA",
        "GQA is grouped query attention: several query heads share one key and value head, which makes "
        "the KV cache smaller.",
    ),
    Entry(
        "MLA",
        "MLA is multi-head latent attention: keys and values are stored as one small latent vector per "
        "token and layer.",
    ),
    Entry(
        "RoPE",
        "RoPE is rotary position embedding: it rotates queries and keys by angles that grow with the "
        "position of the token.",
    ),
    Entry(
        "MoE",
        "MoE is mixture of experts: a router sends each token to a few of many feed-forward networks, so "
        "only some weights work.",
    ),
    Entry(
        "RMSNorm",
        "RMSNorm divides a vector by the root of its mean square and scales each element by a learned "
        "weight.",
    ),
    Entry(
        "a hidden state",
        "A hidden state is the vector that stands for a token between two layers. It is what one stage "
        "sends to the next.",
    ),
    Entry(
        "an embedding",
        "An embedding is the learned vector of a token: the first thing that a model looks up.",
    ),
    Entry(
        "tied embeddings",
        "With tied embeddings one matrix serves both as the input embedding and as the output layer.",
    ),
    Entry(
        "safetensors",
        "Safetensors is a file format for weights: a JSON header with names, types and offsets, then raw "
        "data that can be mapped.",
    ),
    Entry(
        "bfloat16",
        "Bfloat16 is a 16-bit number with the exponent of float32 and a 7-bit fraction: the same range, "
        "less precision.",
    ),
    Entry(
        "quantization",
        "Quantization stores weights or caches with fewer bits, such as 8 or 4, to save memory and "
        "bandwidth at some loss of accuracy.",
    ),
    Entry(
        "LoRA",
        "LoRA adapts a model by adding a product of two thin matrices to a weight, while the weight "
        "itself stays as it is.",
    ),
    Entry(
        "pipeline parallelism",
        "Pipeline parallelism gives each device a range of layers. Only hidden states cross between "
        "stages, so slow links will do.",
    ),
    Entry(
        "tensor parallelism",
        "Tensor parallelism splits each weight matrix over several devices. They add up their parts twice "
        "per layer, which needs fast links.",
    ),
    Entry(
        "data parallelism",
        "Data parallelism runs several full copies of the model, each on its own requests.",
    ),
    Entry(
        "expert parallelism",
        "Expert parallelism places the experts of a layer on different devices and sends each token to "
        "its experts.",
    ),
    Entry(
        "a stage",
        "A stage is a range of layers on the devices that run it. The stages of a pipeline in order make "
        "the whole model.",
    ),
    Entry(
        "a replica",
        "A replica is a whole pipeline that can serve a request from the first layer to the last.",
    ),
    Entry(
        "a pipeline bubble",
        "A pipeline bubble is the time in which a stage has nothing to do because its next micro-batch is "
        "still elsewhere.",
    ),
    Entry("an all-reduce", "An all-reduce adds up the tensors of all ranks and gives every rank the sum."),
    Entry(
        "an all-to-all",
        "In an all-to-all every rank sends a different part of its data to every other rank.",
    ),
    Entry("a rank", "A rank is the number of a process in a parallel group, counted from zero."),
    Entry("NCCL", "NCCL is the library of NVIDIA for collective operations such as all-reduce between GPUs."),
    Entry(
        "disaggregation",
        "Disaggregation runs prefill and decode on different devices, so that neither disturbs the other, "
        "and moves the KV cache between.",
    ),
    Entry(
        "a KV handoff",
        "A KV handoff moves the KV cache of a request from the replica that prefilled it to the one that "
        "decodes it.",
    ),
    Entry(
        "a GPU",
        "A GPU is a processor with thousands of small cores and fast memory, well suited to the matrix "
        "products of a model.",
    ),
    Entry(
        "HBM",
        "HBM is high bandwidth memory: stacked chips beside a GPU that deliver up to several terabytes "
        "per second.",
    ),
    Entry(
        "the roofline",
        "The roofline model says that a kernel runs at the lesser of peak compute and memory bandwidth "
        "times arithmetic intensity.",
    ),
    Entry(
        "arithmetic intensity",
        "Arithmetic intensity is the number of operations done per byte moved from memory.",
    ),
    Entry(
        "memory bandwidth",
        "Memory bandwidth is the number of bytes per second that a device can read from its memory. It "
        "limits decode.",
    ),
    Entry(
        "FLOPS",
        "FLOPS counts floating point operations per second. A forward pass needs about two operations per "
        "weight and token.",
    ),
    Entry("NVLink", "NVLink is a fast link between the GPUs of one host, many times faster than PCIe."),
    Entry("RDMA", "RDMA lets a network card read and write the memory of another host without its CPU."),
    Entry("RTT", "RTT is the round trip time: how long a message takes to a peer and its reply back."),
    Entry(
        "hexmesh",
        "Hexmesh makes one LLM service out of GPUs that are scattered over several sites, without a "
        "central server.",
    ),
    Entry("a mesh", "A mesh is a group of nodes that trust each other and serve a model together."),
    Entry("a node", "A node is a machine in the mesh. It runs one daemon and brings one or more devices."),
    Entry("a device", "A device is a GPU or CPU of a node, with its own memory and its own worker process."),
    Entry(
        "a peer",
        "A peer is another node as seen over a connection. A request may enter the mesh at any peer.",
    ),
    Entry("a daemon", "A daemon is a program that runs in the background. Each node of the mesh runs one."),
    Entry(
        "a coordinator",
        "A coordinator is the elected node that makes the plan. If it is lost, another node takes over "
        "and serving goes on.",
    ),
    Entry(
        "leader election",
        "Leader election is how nodes agree on one of them to decide, and on a new one when that one is "
        "lost.",
    ),
    Entry(
        "a lease",
        "A lease is a right that ends by itself unless it is renewed, so a lost holder blocks nobody for "
        "long.",
    ),
    Entry(
        "a term",
        "A term is a number that grows with each election. What comes from an older term is refused.",
    ),
    Entry(
        "a ballot",
        "A ballot names one candidacy of a coordinator. It starts with the term, and any two ballots can "
        "be ordered.",
    ),
    Entry(
        "an epoch",
        "An epoch is the time in which one plan is in force. A request never crosses stages of two epochs.",
    ),
    Entry(
        "a quorum",
        "A quorum is a number of votes so large that any two quorums share a member, such as a majority.",
    ),
    Entry(
        "two-phase commit",
        "In two-phase commit all parties first prepare and say that they are ready. Then the coordinator "
        "decides for all.",
    ),
    Entry(
        "fencing",
        "Fencing makes a host refuse orders from an old leader, usually by comparing numbers that only grow.",
    ),
    Entry(
        "a network partition",
        "A network partition splits the nodes into groups that cannot reach each other, although all of "
        "them still run.",
    ),
    Entry("churn", "Churn is the coming and going of nodes while the mesh is serving."),
    Entry(
        "a heartbeat",
        "A heartbeat is a small message sent at a steady pace to show that the sender is alive.",
    ),
    Entry(
        "a failure detector",
        "A failure detector suspects a peer that was silent for too long. It cannot tell a dead peer from "
        "a slow one.",
    ),
    Entry(
        "a DHT",
        "A DHT is a distributed hash table: peers share the keys among them, and each look-up takes a few "
        "hops without a server.",
    ),
    Entry(
        "a bootstrap node",
        "A bootstrap node has a stable address where newcomers find the mesh. It holds no model.",
    ),
    Entry(
        "NAT",
        "NAT lets many hosts share one public address. A host behind it can call others but is hard to be "
        "called.",
    ),
    Entry("a relay", "A relay passes bytes between two peers that cannot reach each other directly."),
    Entry(
        "mTLS",
        "In mTLS both ends of a TLS connection show a certificate, so each knows who the other is.",
    ),
    Entry(
        "a certificate",
        "A certificate binds a public key to a name and is signed by an authority that others trust.",
    ),
    Entry(
        "a join token",
        "A join token is a secret with a short life that lets a new node into a closed mesh.",
    ),
    Entry(
        "a plan",
        "A plan says which devices form which replicas, which layers each stage holds, and how requests "
        "flow between them.",
    ),
    Entry(
        "a planner",
        "A planner searches for the plan with the best predicted score, given devices, links, model and "
        "workload.",
    ),
    Entry(
        "max-flow",
        "Max-flow is the largest amount that can pass from source to sink when every edge has a limited "
        "capacity.",
    ),
    Entry(
        "a min-cut",
        "A min-cut is the cheapest set of edges whose removal parts source from sink. Its capacity equals "
        "the max-flow.",
    ),
    Entry(
        "preflow-push",
        "Preflow-push finds a maximum flow by pushing excess from vertex to vertex along edges that lead "
        "downhill.",
    ),
    Entry(
        "spectral partitioning",
        "Spectral partitioning cuts a graph by the signs in the second eigenvector of its Laplacian matrix.",
    ),
    Entry(
        "Kernighan-Lin",
        "Kernighan-Lin improves a cut of a graph in two by swapping pairs of vertices and keeping the "
        "best run of swaps.",
    ),
    Entry(
        "a genetic algorithm",
        "A genetic algorithm keeps a population of solutions, changes and mixes them, and lets the best "
        "survive.",
    ),
    Entry(
        "simulated annealing",
        "Simulated annealing is a search that accepts worse steps with a chance that shrinks as it cools "
        "down.",
    ),
    Entry(
        "dynamic programming",
        "Dynamic programming solves a problem by solving each smaller problem once and keeping the results.",
    ),
    Entry(
        "MILP",
        "MILP is mixed integer linear programming: a linear goal and linear limits, where some variables "
        "must be whole numbers.",
    ),
    Entry(
        "a Pareto front",
        "A Pareto front is the set of choices that no other choice beats in every goal at once.",
    ),
    Entry(
        "a simulator",
        "A simulator plays the serving of requests in virtual time, to predict how a plan will do.",
    ),
    Entry(
        "hysteresis",
        "Hysteresis asks for a clear gain before a change, so that a system does not swing between two "
        "states.",
    ),
    Entry(
        "a bottleneck",
        "A bottleneck is the part that limits the whole. Making any other part faster does not help.",
    ),
)

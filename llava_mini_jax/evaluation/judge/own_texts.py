"""Our words for judges, and the SHA-256 by which the official ones are recognised.

For each benchmark: its texts by name, with {places} to fill. They ask for the scale and the form of
reply that the official texts ask for, and share no sentence with them.
"""

_BENCH_RULE = """\
Above are a question that somebody asked about a picture, a description of that picture in words,
and the answers of two assistants. Grade how well each assistant answered: is the answer useful to
the person who asked, does it keep to the question, is it true of the picture as described, and
does it say as much as was asked for? Give each a score from 1 (worst) to 10 (best).
Begin with one line that holds nothing but the two scores, first that of Assistant 1, then that of
Assistant 2, with one space between them. Give your reasons from the second line on. Which answer
stands first, and how long each is, must not matter."""
_BENCH_NAMES: tuple[str, ...] = ("llava_bench_conv", "llava_bench_detail", "llava_bench_complex")
_BENCH_SHA256 = "2ce22b562d6008864970ea863ac8a4d385ea6f2e64ab1313a23f825202a9529d"
LLAVA_BENCH: dict[str, str] = dict.fromkeys(_BENCH_NAMES, _BENCH_RULE)
LLAVA_BENCH_SYSTEM = "You compare two answers to one question about a picture, fairly and exactly."
LLAVA_BENCH_SHA256: dict[str, str] = dict.fromkeys(_BENCH_NAMES, _BENCH_SHA256)
# Of the official script itself, which has it beside rule.json.
LLAVA_BENCH_OFFICIAL_SYSTEM = (
    "You are a helpful and precise assistant for checking the quality of the answer."
)

MMVET = {
    "prompt": """\
A model was asked questions about pictures. Each row of the table below has a question, what a
right answer must say, and what the model said; its last column is the grade. In the second column
<AND> stands between things that must all be said, <OR> between things of which one is enough.
Grades are 0.0 (nothing right), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 and 1.0 (all right).
What an answer says matters, its words do not. Write only the number that the last row lacks.

Question | Right answer | Model's answer | Grade
--- | --- | --- | ---
Which fruits are in the bowl? | apple <AND> pear | There are two bananas in it. | 0.0
Which fruits are in the bowl? | apple <AND> pear | I can see a pear. | 0.5
Which fruits are in the bowl? | apple <AND> pear | An apple or a banana. | 0.5
Which fruits are in the bowl? | apple <AND> pear | pears, and one red apple | 1.0
What is the man riding? | bike <OR> bicycle | A bicycle. | 1.0
Why is the sign funny? | It forbids swimming in a desert. | It stands in a desert. | 0.3
Why is the sign funny? | It forbids swimming in a desert. | Nobody can swim where no water is. | 0.9
""",
    "again": "The grade, as a number from 0.0 to 1.0: ",
}
MMVET_SHA256 = {
    "prompt": "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f",
    "again": "0c8f545a5726764a768a168c83f24dd9ccdfe6beaa109d5735c98836fb8e322e",
}

_VIDEO_PAIR = """\
Question about a video: {question}
Right answer: {answer}
Given answer: {pred}

"""
VIDEO_QA = {
    "system": """\
You check answers to questions about videos. You do not see the video; you compare the given answer
with the right one. It is right if it means the same: other words for the same thing are no mistake,
and neither is a whole sentence where one word would do.""",
    "user": _VIDEO_PAIR
    + """\
Is the given answer right, and how well does it match, from 0 (not at all) to 5 (fully)? Reply with
a Python dictionary and nothing else, with the keys 'pred' ('yes' or 'no') and 'score' (a whole
number from 0 to 5). An example of the form: {'pred': 'no', 'score': 1}""",
}
VIDEO_QA_SHA256 = {
    "system": "12b9e42d120081bf1e7f1999bb09db2db250add544abd3c183d61a2f938c6510",
    "user": "66490ee04d3bedaa932916173b5522bb8748c93d422666446671e2e2a965f3c0",
}

_SCORE = """\
Reply with a Python dictionary and nothing else, with the key 'score' and a whole number from 0
(worst) to 5 (best). An example of the form: {'score': 2}"""


def _about(what: str) -> str:
    return (
        "You grade answers to questions about videos. You do not see the video; you compare the"
        f" given answer with the right one, in one respect alone: {what} Other words for the same"
        " thing are no mistake."
    )


VIDEO_CHATGPT = {
    "correctness.system": _about(
        "whether what it says is true. Things that are wrong or made up lower the score; things"
        " that it leaves out do not."
    ),
    "correctness.user": _VIDEO_PAIR + "How true is the given answer? " + _SCORE,
    "detail.system": _about(
        "how much of the right answer it covers, and how particular it is. Points that are left"
        " out, and general words where the right answer has particulars, lower the score."
    ),
    "detail.user": _VIDEO_PAIR + "How complete and particular is the given answer? " + _SCORE,
    "contextual.system": _about(
        "whether it has understood what the video as a whole is about, its subject and its mood."
        " Things that do not belong there lower the score."
    ),
    "contextual.user": _VIDEO_PAIR + "How well does the given answer fit the whole? " + _SCORE,
    "temporal.system": _about(
        "whether what happens is told in the order in which it happens. Events in a wrong order"
        " lower the score."
    ),
    "temporal.user": _VIDEO_PAIR + "How right is the order in the given answer? " + _SCORE,
    "consistency.system": _about(
        "whether two answers to two forms of one question agree, with each other and with the"
        " right answer. Whatever only one of them says, or says otherwise, lowers the score."
    ),
    "consistency.user": """\
First form of the question about a video: {question1}
Second form: {question2}
Right answer: {answer}
Answer given to the first form: {pred1}
Answer given to the second form: {pred2}

How well do the given answers agree? """
    + _SCORE,
}
VIDEO_CHATGPT_SHA256 = {
    "correctness.system": "d3e95c91b75d55f1697314779ea99483cf497e4dc5c801829086fb6da23b94a5",
    "correctness.user": "b73821cf31e193f1bb627924c6cc946b7bc8b3cf1aee45797ed0c7a19b574d4e",
    "detail.system": "692afe543175215e773d22d66e479e9eba30ce2d8076d92d89c6f96fcc716d5d",
    "detail.user": "12a0945be9496cfb694fc31d3180fdbcd3475770f886ca334864feedfd21fcd4",
    "contextual.system": "ab6063175e1a35daec0b07fc8071bf1f6ae6ddcf65f4f82daee873de96e089c1",
    "contextual.user": "c48840afd96688beb637d48d700269dd787f09414dfa3446630878d2d56604b8",
    "temporal.system": "2a0b0335b04144b933618382d211453e05d331ca52f0a75fe7606477356b34d0",
    "temporal.user": "98f80acc48fefa7fd49b5c486412c752dddaf369dfc85cf1ef8008339038b65e",
    "consistency.system": "15f01dba1f255e7f676dc0e88eabea23dec7c1bfa102695dc21ceecacf5b204d",
    "consistency.user": "45cb7a21eb8ae21429dc697102248d466dd3aa56bd79c25e13e1cc1eebc87788",
}

"""Short stories with a hero, a problem and a helper."""

from demo_recipe.chat.vocabulary import ADJECTIVES, NAMES, listed
from demo_recipe.chat.wording import capitalise, with_article

PLACES = listed(
    """
    a small village by the sea | the edge of a dark forest | a busy harbour town | a quiet valley | a
    tall tower | a farm on a hill | a little house near the river | the middle of a large city | a snowy
    mountain hut | an old castle | a warm island | a train station | a library full of old books | a
    data centre full of blinking lights | a garden behind the school
    """
)


HEROES = listed(
    """
    cat | dog | fox | rabbit | mouse | bear | owl | duck | robot | dragon | farmer | baker | painter |
    sailor | teacher | pilot | wizard | queen | king | girl | boy | singer | otter | wolf | token |
    worker | router
    """
)


PLOTS = [  # problem, attempt, resolution ({h} hero name, {f} helper, {o} object)
    (
        "One morning the {o} was gone.",
        "{h} looked under every stone but found nothing.",
        "{f} had seen it behind the old wall, and together they brought the {o} home.",
    ),
    (
        "A great storm came and broke the {o}.",
        "{h} tried to mend it alone, but it fell apart again.",
        "{f} held the pieces while {h} tied them, and soon the {o} was as good as new.",
    ),
    (
        "One night the lights went out and nobody could find the way.",
        "{h} walked slowly in the dark and felt afraid.",
        "{f} came with a lantern, and step by step they found the path again.",
    ),
    (
        "The river rose and the only bridge was washed away.",
        "{h} stood on the bank and did not know what to do.",
        "{f} knew how to build a boat, and by evening everyone was safe on the other side.",
    ),
    (
        "All the others had a friend, but {h} was always alone.",
        "{h} sat by the {o} and waited for someone to come.",
        "{f} sat down too, and from then on neither of them was lonely.",
    ),
    (
        "{h} wanted to learn to sing, but every note came out wrong.",
        "Day after day {h} tried, and the neighbours closed their windows.",
        "{f} listened with patience and showed how to breathe, and at last the song was lovely.",
    ),
    (
        "There was a key, but nobody knew which door it opened.",
        "{h} tried it on forty doors, and none of them moved.",
        "{f} pointed to a tiny door behind the {o}, and inside they found a room full of music.",
    ),
    (
        "The well dried up and everyone was thirsty.",
        "{h} dug in the field until the sun went down, but the ground stayed dry.",
        "{f} heard water under a big rock, and together they rolled it away.",
    ),
    (
        "{h} lost the {o} on the way to the market.",
        "{h} walked back along the road and asked everyone.",
        "{f} had picked it up and kept it safe, and gave it back with a smile.",
    ),
    (
        "A machine stopped in the middle of its work.",
        "{h} pushed every button, but nothing happened.",
        "{f} carried the work to another machine, and it went on as if nothing had happened.",
    ),
    (
        "A strange noise came from the hill each night.",
        "{h} climbed up to look and got lost in the fog.",
        "{f} came along and laughed, for the noise was only the wind in an old {o}.",
    ),
    (
        "Winter came early and there was not enough food.",
        "{h} counted the last {o} again and again.",
        "{f} shared a full basket, and they cooked a soup that lasted until spring.",
    ),
]


ENDINGS = [
    "From that day on they were the best of friends.",
    "And everyone slept well that night.",
    "{h} never forgot how good it is to have help.",
    "They celebrated with cake until the stars came out.",
    "After that, {h} was never afraid again.",
    "And that is why the people still tell this story.",
    "{h} smiled and went home.",
]


HABITS = [
    "Every day {h} went for a long walk.",
    "{h} loved the early morning best of all.",
    "Everyone knew {h} for being {a}.",
    "{h} had a little {o} and took good care of it.",
    "{h} liked to look at the stars and count them.",
    "{h} dreamed of seeing the whole world.",
]


TURNS = [
    "{h} was sad, but did not give up.",
    "Then {h} had an idea.",
    "{h} took a deep breath and called for help.",
    "Just then, someone came along the road.",
    "It seemed that nothing could be done.",
]


def story(rng, who=None, obj=None):
    who = who or rng.choice(HEROES)
    h, hn = rng.sample(NAMES, 2)
    fk = rng.choice([w for w in HEROES if w != who])
    o = obj or rng.choice(
        """
    bell lantern boat kite clock map basket ring flag wheel book lamp hat coin mirror apple drum rope
    jar
""".split()
    )
    fn = f"{hn} the {fk}"
    p, t, r = rng.choice(PLOTS)
    s = [
        rng.choice(
            [
                "Once upon a time there was {a} called {h} who lived in {p}.",
                "In {p} lived {a} named {h}.",
                "Long ago, {a} called {h} lived in {p}.",
            ]
        )
    ]
    s[0] = (
        s[0]
        .format(a=with_article(rng.choice(ADJECTIVES[4:]) + " " + who), h=h, p=rng.choice(PLACES))
        .replace("in the edge", "at the edge")
        .replace("In the edge", "At the edge")
    )
    body = []
    if rng.random() < 0.7:
        body.append(rng.choice(HABITS))
    body += [p, t]
    if rng.random() < 0.6:
        body.append(rng.choice(TURNS))
    body += [
        "Then "
        + hn
        + ", "
        + with_article(rng.choice(ADJECTIVES[4:]) + " " + fk)
        + ", came by and offered to help."
        if rng.random() < 0.85
        else "At last {h} asked " + fn + " for help.",
        r,
        rng.choice(ENDINGS),
    ]
    out = s + [
        x.format(
            h=h,
            f=hn,
            o=o,
            a=rng.choice("brave clever gentle kind shy proud curious cheerful careful quiet happy".split()),
        )
        for x in body
    ]
    return " ".join(capitalise(x) for x in out)


def story_request(rng):
    who = rng.choice(HEROES)
    obj = (
        rng.choice("bell lantern boat kite clock map basket ring flag wheel book lamp".split())
        if rng.random() < 0.2
        else None
    )
    about = with_article(who) + (f" and {with_article(obj)}" if obj else "")
    if rng.random() < 0.12:
        return (
            rng.choice(
                ["Tell me a story.", "tell me a story", "I want to hear a story.", "Write a short story."]
            ),
            "I tell a short story with a happy end.",
            story(rng),
        )
    return (
        rng.choice(
            [
                "Tell me a story about {}.",
                "tell me a story about {}",
                "Write a short story about {}.",
                "Can you tell a story about {}?",
                "I would like a story about {}.",
                "story about {}",
                "Make up a tale about {}.",
            ]
        ).format(about),
        rng.choice(
            [
                f"The story is about {about}. I give the hero a problem and a helper.",
                f"I tell a short story about {about}.",
                "A short story with a happy end is wanted.",
            ]
        ),
        story(rng, who, obj),
    )

# SPDX-License-Identifier: Apache-2.0
"""The words of the demo's problems: people, things, and the wordings of every kind of problem.

A wording is a format string over ``{name}``, ``{other}``, ``{items}``, ``{box}``, ``{place}`` and
the numbers ``{a}``, ``{b}``, ``{c}``, which come in this order in the text. Every wording of a kind
has a phrase that no other kind uses, so the text alone says what is asked.
"""

from collections.abc import Mapping

NAMES = tuple(
    """
    Ada Aisha Akira Alba Amara Amir Anders Anika Anton Aroha Astrid Ayo Beatriz Benno Bilal
    Bruna Callum Carmen Chidi Chloe Clara Dalia Daria David Deniz Dilan Dmitri Edda Eero Elena
    Elias Emeka Emil Esra Ewa Fadi Farah Felix Fiona Frida Gael Goran Greta Hana Hari Hassan
    Hedda Hugo Ida Ilya Imani Ines Ingrid Iris Ivan Jada Jakob Jamal Jana Javier Jelena Jonas
    Jun Kaito Kamala Karim Katya Kenji Kiran Kofi Lars Layla Leila Leon Lina Luca Lucia Magnus
    Mai Malik Mara Marek Marta Mateo Maya Meera Milan Mina Mira Nadia Naoki Nia Nikola Nils Noor
    Nora Olga Omar Oskar Otto Paula Pavel Petra Pilar Priya Quentin Rafael Rania Ravi Rosa Ruben
    Ruth Sadia Said Samira Sanjay Selma Senna Sigrid Sofia Stefan Sven Tamar Tariq Teresa Theo
    Tomas Uma Ursula Vera Viktor Wanda Wei Yara Yusuf Zahra Zeno Zofia
    """.split()
)

ITEMS = tuple(
    """
    acorns almonds anchors apples apricots arrows badges balloons bananas beads bells berries
    biscuits blankets blocks books bottles bowls bracelets brushes buckets bulbs buttons cakes
    candles cards carrots chairs cherries chestnuts combs cones cookies corks crayons
    crystals cups daisies dates diaries dolls doughnuts drums eggs envelopes erasers feathers
    figs flags flowers flutes forks gloves grapes hammers hats hooks jars jewels jugs keys kites
    ladles lamps lanterns leaves lemons letters limes magnets mangoes maps marbles masks medals
    melons mirrors mittens muffins mugs mushrooms nails needles notebooks nuts olives onions
    oranges paddles pancakes papers peaches peanuts pears pebbles pencils pens peppers photos
    pillows pins plates plums poems postcards posters potatoes pots presents pretzels pumpkins
    puppets puzzles radishes records ribbons rings ropes roses rulers sandwiches scarves seeds
    shells shirts shovels socks spoons stamps stars stickers stones strawberries straws sweets
    tickets tiles tomatoes toys trays tulips turnips vases walnuts wheels whistles
    """.split()
)

ADJECTIVES = tuple(
    """
    amber big black blue bright bronze brown clean copper crimson curved dark dotted dusty fancy
    flat fresh golden green grey heavy ivory large light little long narrow new odd old orange
    painted pale pink plain polished purple rare red round rusty scarlet shiny short silver
    small smooth soft square striped tall thin tiny turquoise violet warm white wide wooden
    yellow
    """.split()
)

BOXES = tuple(
    """
    bags barrels baskets bins boxes bundles cartons cases chests crates drawers folders heaps
    packets pallets parcels piles pouches rows sacks shelves stacks tins trunks tubs
    """.split()
)

PLACES = tuple(
    """
    attic bakery barn bazaar cabin castle cellar chapel classroom corner depot ferry forest
    garage garden hall hangar harbour kitchen laboratory library market meadow mill museum
    office orchard park playground school shop stable station studio tavern theatre tower
    village warehouse workshop yard zoo
    """.split()
)

WORDINGS: Mapping[str, tuple[str, ...]] = {
    "gain": (
        "{name} has {a} {items} and finds {b} more at the {place}. "
        "How many {items} does {name} have now?",
        "There are {a} {items} in the {place}. {name} brings {b} more. "
        "How many {items} are there now?",
        "{name} keeps {a} {items}. At the {place}, {other} hands over {b} more. "
        "How many {items} does {name} have?",
    ),
    "loss": (
        "{name} has {a} {items} and loses {b} of them at the {place}. How many {items} are left?",
        "There were {a} {items} in the {place}. {name} took away {b}. How many {items} are left?",
        "{name} had {a} {items} and sold {b} to {other} at the {place}. How many {items} are left?",
    ),
    "groups": (
        "In the {place} {name} counts {a} {box} with {b} {items} in each. "
        "How many {items} is that in all?",
        "{name} fills {a} {box} with {b} {items} each. How many {items} is that in all?",
        "{other} sends {name} {a} {box} and each holds {b} {items}. "
        "How many {items} is that in all?",
    ),
    "share": (
        "{name} splits {a} {items} evenly over {b} {box}. How many {items} go in each?",
        "At the {place}, {a} {items} are packed evenly in {b} {box}. How many {items} go in each?",
    ),
    "difference": (
        "{name} has {a} {items} and {other} has {b}. How many more {items} does {name} have?",
        "At the {place} {name} counts {a} {items} and {other} only {b}. "
        "How many more did {name} count?",
    ),
    "gain_loss": (
        "{name} has {a} {items}, buys {b} at the {place} and gives {c} to {other}. "
        "How many {items} remain?",
        "There are {a} {items} in the {place}. {name} adds {b}, then {other} takes {c}. "
        "How many {items} remain?",
    ),
    "groups_gain": (
        "{name} has {a} {box} of {b} {items} and {c} loose ones. "
        "How many {items} are there altogether?",
        "In the {place} stand {a} {box} of {b} {items}, and {other} holds {c} extra. "
        "How many are there altogether?",
    ),
    "groups_loss": (
        "{name} had {a} {box} of {b} {items}, but {c} broke at the {place}. "
        "How many {items} are still whole?",
        "{other} stacks {a} {box} of {b} {items}, and then {c} crack. "
        "How many {items} are still whole?",
    ),
    "together": (
        "{name} has {a} {items}. {other} has {b} more than {name}. "
        "How many {items} do both have together?",
        "At the {place} {name} sells {a} {items} and {other} sells {b} more than that. "
        "How many together?",
    ),
    "change": (
        "{name} has {a} coins and buys {b} {items} for {c} coins each. "
        "How many coins does {name} keep?",
        "{name} takes {a} coins to the {place} and pays for {b} {items} at {c} coins each. "
        "How many coins does {name} keep?",
    ),
}

FIRST_STEPS = ("First", "To begin", "At first", "Step one:", "We start with", "Work out")
NEXT_STEPS = ("Then", "Next", "After that", "Now", "Step two:", "This leads to")

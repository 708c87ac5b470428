"""The topics of the embedded questions, and their three disjoint splits.

A topic belongs to one split only, so that no question of the validation or test split shares its subject with training.
The split is by position after a shuffle with a fixed seed: TEST and VALIDATION first, the rest is for training.
"""

from random import Random

TEST, VALIDATION = 48, 40

TOPICS = tuple(
    topic.strip()
    for topic in """
    coffee; tea; bread; cheese; honey; chocolate; rice; pasta; soup; salt; sugar; apples; bananas; oranges; grapes; tomatoes;
    potatoes; onions; carrots; mushrooms; eggs; milk; butter; olive oil; pepper; garlic; ice cream; pancakes; pizza; popcorn;
    dogs; cats; horses; cows; sheep; goats; chickens; ducks; rabbits; mice; elephants; lions; tigers; bears; wolves; foxes;
    deer; whales; dolphins; sharks; penguins; owls; eagles; parrots; bees; butterflies; ants; spiders; frogs; turtles; snakes;
    crocodiles; octopuses; salmon; crabs; monkeys; giraffes; zebras; kangaroos; bats; squirrels; hedgehogs; snails; worms;
    trees; roses; sunflowers; grass; cactus plants; forests; jungles; deserts; mountains; valleys; rivers; lakes; oceans;
    islands; beaches; caves; volcanoes; earthquakes; glaciers; waterfalls; swamps; rain; snow; wind; clouds; lightning; fog;
    rainbows; storms; the sun; the moon; stars; planets; comets; black holes; gravity; light; sound; heat; electricity;
    magnets; atoms; water; iron; gold; silver; copper; glass; paper; plastic; wood; stone; sand; clay; cotton; wool; silk;
    leather; rubber; ink; soap; candles; mirrors; clocks; calendars; maps; compasses; keys; locks; doors; windows; bridges;
    tunnels; roads; trains; bicycles; cars; buses; boats; ships; submarines; airplanes; helicopters; rockets; satellites;
    telescopes; microscopes; cameras; radios; televisions; telephones; computers; keyboards; robots; batteries; engines;
    lamps; fireplaces; ovens; refrigerators; kettles; spoons; knives; plates; cups; chairs; tables; beds; pillows; carpets;
    shoes; hats; gloves; scarves; coats; umbrellas; glasses; buttons; needles; ropes; ladders; hammers; nails; saws; wheels;
    farms; gardens; parks; zoos; museums; libraries; schools; hospitals; markets; bakeries; restaurants; hotels; castles;
    lighthouses; windmills; villages; cities; airports; harbors; football; tennis; swimming; running; skiing;
    chess; card games; puzzles; kites; dancing; singing; pianos; guitars; violins; drums; painting; drawing; sculpture;
    poetry; novels; fairy tales; theater; movies; photography; cooking; baking; sewing; knitting; fishing; hiking; camping;
    sailing; gardening; birthdays; weddings; holidays; letters; postcards; stamps; coins; money; banks; newspapers;
    dictionaries; alphabets; numbers; circles; triangles; fractions; teachers; doctors; nurses; farmers; firefighters;
    bakers; carpenters; pilots; sailors; astronauts; scientists; friendship; sleep; dreams; laughter; memory; teeth; bones;
    the heart; lungs; skin; hands; winter; spring; autumn; summer; mornings; shadows
    """.replace("\n", " ").split(";")
)


def split_topics() -> dict[str, tuple[str, ...]]:
    """The topics of each split: {"test": ..., "validation": ..., "train": ...}, disjoint, in a fixed order."""
    shuffled = list(TOPICS)
    Random("topics").shuffle(shuffled)
    return {
        "test": tuple(shuffled[:TEST]),
        "validation": tuple(shuffled[TEST : TEST + VALIDATION]),
        "train": tuple(shuffled[TEST + VALIDATION :]),
    }

"""What the questions about the world are made from."""

from demo_recipe.chat.vocabulary import listed

COUNTRIES = listed(
    """
    France Paris | Germany Berlin | Spain Madrid | Italy Rome | Austria Vienna | Portugal Lisbon |
    Ireland Dublin | Norway Oslo | Sweden Stockholm | Finland Helsinki | Denmark Copenhagen | Poland
    Warsaw | Hungary Budapest | Greece Athens | Switzerland Bern | Belgium Brussels | Latvia Riga |
    Lithuania Vilnius | Estonia Tallinn | Turkey Ankara | Egypt Cairo | Kenya Nairobi | Nigeria Abuja |
    Ghana Accra | Tunisia Tunis | Morocco Rabat | Japan Tokyo | China Beijing | Vietnam Hanoi | Thailand
    Bangkok | Indonesia Jakarta | Philippines Manila | India New Delhi | Australia Canberra | Canada
    Ottawa | Peru Lima | Colombia Bogota | Chile Santiago | Ecuador Quito | Cuba Havana | Brazil
    Brasilia | Argentina Buenos Aires | Uruguay Montevideo | Paraguay Asuncion | Venezuela Caracas |
    Mexico Mexico City | Iceland Reykjavik | Croatia Zagreb | Slovenia Ljubljana | Slovakia Bratislava |
    Serbia Belgrade | Bulgaria Sofia | Romania Bucharest | Ukraine Kyiv | Russia Moscow | Albania Tirana
    | Cyprus Nicosia | Malta Valletta | Jordan Amman | Lebanon Beirut | Iraq Baghdad | Iran Tehran |
    Qatar Doha | Oman Muscat | Pakistan Islamabad | Nepal Kathmandu | Bangladesh Dhaka | Malaysia Kuala
    Lumpur | Cambodia Phnom Penh | Laos Vientiane | Mongolia Ulaanbaatar | Taiwan Taipei | Ethiopia
    Addis Ababa | Uganda Kampala | Rwanda Kigali | Senegal Dakar | Algeria Algiers | Libya Tripoli |
    Sudan Khartoum | Angola Luanda | Zambia Lusaka | Zimbabwe Harare | Namibia Windhoek | Botswana
    Gaborone | Georgia Tbilisi | Armenia Yerevan | Luxembourg Luxembourg | Monaco Monaco | Jamaica
    Kingston | Panama Panama City | Bahrain Manama | Fiji Suva
    """
)


CAPITALS = [tuple(x.split(" ", 1)) for x in COUNTRIES] + [
    ("South Korea", "Seoul"),
    ("the United Kingdom", "London"),
    ("the United States", "Washington"),
    ("the Netherlands", "Amsterdam"),
    ("New Zealand", "Wellington"),
    ("the Czech Republic", "Prague"),
    ("Saudi Arabia", "Riyadh"),
    ("Costa Rica", "San Jose"),
]


CAPITALS = [("the Philippines", b) if a == "Philippines" else (a, b) for a, b in CAPITALS]


MONTHS = "January February March April May June July August September October November December".split()


MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]


ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()


OPPOSITES = listed(
    """
    hot cold | big small | tall short | fast slow | happy sad | light dark | open closed | up down |
    left right | old new | hard soft | wet dry | full empty | early late | rich poor | strong weak |
    loud quiet | clean dirty | high low | near far | day night | begin end | win lose | buy sell | push
    pull | love hate | true false | inside outside | above below | always never | thick thin | wide
    narrow | sweet sour | heavy light | brave afraid | good bad | first last | young old | black white |
    safe dangerous | deep shallow | sharp blunt | smooth rough | easy difficult | give take | before
    after
    """
)


PLURALS = listed(
    """
    child children | mouse mice | foot feet | tooth teeth | man men | woman women | goose geese | sheep
    sheep | fish fish | leaf leaves | knife knives | wolf wolves | city cities | baby babies | box boxes
    | bus buses | cat cats | dog dogs | book books | tree trees | person people | potato potatoes |
    tomato tomatoes | story stories | watch watches | dish dishes | ox oxen | deer deer | half halves |
    life lives | key keys | toy toys | car cars | house houses | berry berries
    """
)


COLOURS_OF = listed(
    """
    the sky|blue; grass|green; snow|white; a banana|yellow; a lemon|yellow; blood|red; coal|black; a
    carrot|orange; milk|white; an emerald|green; a ruby|red; a ripe tomato|red; an elephant|grey;
    chocolate|brown; a polar bear|white; a sunflower|yellow; spinach|green; a flamingo|pink; salt|white;
    a crow|black
    """,
    ";",
)


YOUNG = listed(
    """
    dog puppy | cat kitten | cow calf | horse foal | sheep lamb | goat kid | pig piglet | lion cub |
    bear cub | duck duckling | goose gosling | deer fawn | kangaroo joey | swan cygnet | frog tadpole |
    hen chick | owl owlet | elephant calf | fox cub | whale calf | seal pup | rabbit kit
    """
)


SOUNDS = listed(
    """
    dog barks | cat meows | cow moos | sheep bleats | horse neighs | duck quacks | lion roars | pig
    grunts | owl hoots | wolf howls | bee buzzes | snake hisses | frog croaks
    """
)


GENERAL = [
    ("How many days are in a week?", "There are 7 days in a week."),
    ("How many months are in a year?", "There are 12 months in a year."),
    ("How many hours are in a day?", "There are 24 hours in a day."),
    ("How many days are in a year?", "A year has 365 days, and a leap year has 366."),
    ("How many legs does a spider have?", "A spider has 8 legs."),
    ("How many legs does an insect have?", "An insect has 6 legs."),
    ("How many sides does a triangle have?", "A triangle has 3 sides."),
    ("How many sides does a hexagon have?", "A hexagon has 6 sides."),
    ("At what temperature does water freeze?", "Water freezes at 0 degrees Celsius."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius at sea level."),
    ("What is the largest ocean?", "The largest ocean is the Pacific Ocean."),
    ("What is the tallest mountain on Earth?", "The tallest mountain on Earth is Mount Everest."),
    ("What is the fastest land animal?", "The fastest land animal is the cheetah."),
    ("What is the largest animal?", "The largest animal is the blue whale."),
    ("What do bees make?", "Bees make honey."),
    ("What do plants need to grow?", "Plants need light, water and air to grow."),
    ("Why is the sky blue?", "The air scatters blue light more than red light, so the sky looks blue."),
    ("What causes tides?", "Tides are caused mostly by the pull of the Moon."),
    ("How many continents are there?", "There are 7 continents."),
    ("What is the chemical formula of water?", "The formula of water is H2O."),
    ("How many minutes are in an hour?", "There are 60 minutes in an hour."),
    ("Which season comes after winter?", "Spring comes after winter."),
    ("Which season comes after summer?", "Autumn comes after summer."),
    ("What is the star at the centre of our solar system?", "It is the Sun."),
    ("How many letters are in the English alphabet?", "The English alphabet has 26 letters."),
]


PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()

"""Names, places and words that the conversations draw from."""


def listed(text, separator="|"):
    """The entries of a list that is wrapped over lines."""
    return [" ".join(entry.split()) for entry in text.split(separator)]


NAMES = """
    Ada Ben Cara Dan Eva Finn Gina Hugo Iris Jack Kira Leo Mia Noah Olga Paul Quinn Rosa Sam Tara Uma
    Victor Wendy Xena Yusuf Zoe Alice Bob Carol David Emma Frank Grace Henry Ivan Julia Karl Lena Marco
    Nina Oscar Petra Rita Simon Tina Vera Walter Yara Amir Bella Chen Dora Elias Fatima George Hana Igor
    Jonas Kenji Laila Mateo Nora Omar Priya Ravi Sofia Tomas Ursula Viktor Wei Yuki Anna Boris Clara
    Diego Ella Felix Greta Harry Ines Jan Kofi Lucy Max Nadia Otto Pablo Ruth Stefan Thea Ugo Vivian
    Will Ziad Aisha Bruno Celia Dmitri Erik Freya Gustav Helen
""".split()


CITIES = listed(
    """
    Paris | London | Berlin | Madrid | Rome | Vienna | Lisbon | Dublin | Oslo | Stockholm | Helsinki |
    Copenhagen | Warsaw | Prague | Budapest | Athens | Bern | Zurich | Geneva | Basel | Munich | Hamburg
    | Cologne | Lyon | Nice | Marseille | Milan | Naples | Turin | Venice | Florence | Barcelona |
    Seville | Valencia | Porto | Brussels | Antwerp | Amsterdam | Rotterdam | Krakow | Riga | Vilnius |
    Tallinn | Istanbul | Ankara | Cairo | Nairobi | Lagos | Accra | Tunis | Rabat | Tokyo | Kyoto |
    Osaka | Seoul | Busan | Beijing | Shanghai | Hanoi | Bangkok | Jakarta | Manila | Singapore | Delhi
    | Mumbai | Sydney | Melbourne | Perth | Auckland | Toronto | Montreal | Vancouver | Ottawa | Boston
    | Chicago | Denver | Seattle | Austin | Dallas | Miami | New York | San Francisco | Lima | Bogota |
    Santiago | Quito | Havana
    """
)


CATEGORIES = {
    "fruits": """
    apple banana cherry grape lemon mango melon orange peach pear plum kiwi apricot fig lime papaya
    raspberry strawberry
""".split(),
    "animals": """
    cat dog horse cow sheep goat pig lion tiger bear wolf fox rabbit mouse elephant giraffe zebra monkey
    deer otter
""".split(),
    "colours": "red blue green yellow orange purple pink brown black white grey".split(),
    "vegetables": """
    carrot potato onion tomato pepper spinach cabbage bean pea leek pumpkin radish celery cucumber
""".split(),
    "tools": "hammer saw drill wrench screwdriver pliers chisel ruler shovel rake ladder".split(),
    "birds": "eagle owl robin crow sparrow parrot swan duck goose penguin falcon heron".split(),
    "instruments": "piano violin guitar flute drum trumpet harp cello clarinet organ".split(),
    "sports": "football tennis hockey golf boxing rowing swimming cycling chess skiing".split(),
    "drinks": "water tea coffee milk juice cocoa lemonade soda".split(),
    "vehicles": "car bus train bicycle boat plane truck tram scooter ship".split(),
    "trees": "oak pine birch maple willow cedar elm beech ash spruce".split(),
    "clothes": "shirt coat hat scarf sock shoe glove dress jacket belt sweater".split(),
    "kitchen things": "spoon fork knife plate cup bowl pan kettle oven pot jar".split(),
    "furniture": "table chair bed sofa desk shelf lamp stool bench cupboard".split(),
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split(),
}


OTHER_NOUNS = """
    garden river mountain forest bridge castle window door street market school library museum station
    harbour island valley village village storm winter summer letter book pencil paper map clock mirror
    candle basket bottle box key coin ring rope flag bell wheel engine robot rocket planet star moon
    cloud rain snow wind sand stone gold silver teacher doctor farmer painter sailor baker pilot singer
    writer driver hunter queen king friend neighbour sister brother uncle cousin child dragon wizard
    giant server cluster token model expert router worker queue cache memory network packet kernel
    vector matrix tensor number letter sentence story poem song picture game puzzle bread cheese butter
    honey sugar salt soup salad cake cookie pie rice noodle egg ocean lake beach desert cave field
    meadow road path tunnel tower roof wall floor kitchen camera radio phone laptop screen keyboard
    button cable battery lantern umbrella blanket pillow carpet curtain ticket suitcase wallet hammer
    needle thread feather shell
""".split()


NOUNS = sorted(set(OTHER_NOUNS) | set(w for c in CATEGORIES.values() for w in c if w.islower()))


ADJECTIVES = """
    small big old young bright quiet happy brave clever gentle slow quick tall kind shy proud lazy
    curious cheerful careful golden silver green blue warm cold soft strong
""".split()


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

"""The things of the generated world: which emoji is drawn for which name.

A name is one or two lower-case words.  No two things share one, and none has the name of a simple shape.  As far as
the font allows, no two things look alike at 14 pixels.  People, hands, faces, flags, arrows, letters, signs, clock
faces and other symbols are left out.

The table is written out, not derived from `unicodedata`: that changes with the Python version, and the world must not.
"""

from __future__ import annotations

# One thing per entry: the character, then its name.  `~` marks a name that takes "some", not "a" (plural or mass).
_TABLE = """
🐒 monkey, 🦍 gorilla, 🦧 orangutan, 🐕 dog, 🐩 poodle, 🐺 wolf, 🦊 fox, 🦝 raccoon, 🐈 cat, 🦁 lion, 🐅 tiger,
🐆 leopard, 🐎 horse, 🦄 unicorn, 🦓 zebra, 🦌 deer, 🦬 bison, 🐄 cow, 🐖 pig, 🐗 boar, 🐏 ram, 🐑 sheep,
🐐 goat, 🐪 camel, 🦙 llama, 🦒 giraffe, 🐘 elephant, 🦣 mammoth, 🦏 rhinoceros, 🦛 hippopotamus, 🐁 mouse,
🐹 hamster, 🐇 rabbit, 🐿 chipmunk, 🦫 beaver, 🦔 hedgehog, 🦇 bat, 🐻 bear, 🐨 koala, 🐼 panda, 🦥 sloth,
🦦 otter, 🦨 skunk, 🦘 kangaroo, 🦡 badger, 🦃 turkey, 🐓 rooster, 🐣 chick, 🐧 penguin, 🕊 dove, 🦅 eagle,
🦆 duck, 🦢 swan, 🦉 owl, 🦤 dodo, 🦩 flamingo, 🦚 peacock, 🦜 parrot, 🐸 frog, 🐊 crocodile, 🐢 turtle,
🦎 lizard, 🐍 snake, 🐉 dragon, 🦕 sauropod, 🦖 dinosaur, 🐋 whale, 🐬 dolphin, 🦭 seal, 🐟 fish, 🐡 blowfish,
🦈 shark, 🐙 octopus, 🐚 seashell, 🦀 crab, 🦞 lobster, 🦐 shrimp, 🦑 squid, 🦪 oyster, 🐌 snail, 🦋 butterfly,
🐛 caterpillar, 🐜 ant, 🐝 bee, 🪲 beetle, 🐞 ladybug, 🦗 cricket, 🪳 cockroach, 🕷 spider, 🕸 spider web,
🦂 scorpion, 🦟 mosquito, 🪰 fly, 🪱 worm, 🦠 microbe, 🐾 ~paw prints, 🪶 feather, 🪸 coral, 🪺 bird nest,
💐 bouquet, 🌹 rose, 🥀 wilted flower, 🌺 hibiscus, 🌻 sunflower, 🌼 daisy, 🌷 tulip, 🌱 seedling,
🪴 potted plant, 🌲 pine tree, 🌳 tree, 🌴 palm tree, 🌵 cactus, 🌾 ~wheat, 🍀 clover, 🍁 maple leaf,
🍄 mushroom, 🎋 ~bamboo, 🎄 christmas tree, 🪷 lotus, 🌰 chestnut, 🪵 log, 🪨 rock, 🍇 ~grapes, 🍈 melon,
🍉 watermelon, 🍊 tangerine, 🍋 lemon, 🍌 banana, 🍍 pineapple, 🥭 mango, 🍎 apple, 🍐 pear, 🍑 peach,
🍒 ~cherries, 🍓 strawberry, 🫐 ~blueberries, 🥝 kiwi, 🍅 tomato, 🫒 olive, 🥥 coconut, 🥑 avocado, 🍆 eggplant,
🥔 potato, 🥕 carrot, 🌽 ~corn, 🌶 chili pepper, 🫑 bell pepper, 🥒 cucumber, 🥬 ~lettuce, 🥦 ~broccoli,
🧄 ~garlic, 🧅 onion, 🥜 peanut, 🫘 ~beans, 🍞 ~bread, 🥐 croissant, 🥖 baguette, 🥨 pretzel, 🥯 bagel,
🥞 ~pancakes, 🧇 waffle, 🧀 ~cheese, 🍖 ~meat, 🍗 drumstick, 🥩 steak, 🥓 ~bacon, 🍔 hamburger, 🍟 ~fries,
🍕 pizza, 🌭 hot dog, 🥪 sandwich, 🌮 taco, 🌯 burrito, 🫔 tamale, 🥚 egg, 🍳 fried egg, 🍲 ~soup, 🥗 ~salad,
🍿 ~popcorn, 🧈 ~butter, 🥫 tin can, 🍱 bento box, 🍙 rice ball, 🍜 ~noodles, 🍝 ~spaghetti, 🍠 sweet potato,
🍢 skewer, 🍣 ~sushi, 🍤 fried shrimp, 🥟 dumpling, 🥠 fortune cookie, 🥡 takeout box, 🍦 ice cream, 🍧 sundae,
🍩 donut, 🍪 cookie, 🎂 birthday cake, 🍰 shortcake, 🧁 cupcake, 🥧 pie, 🍫 chocolate bar, 🍬 candy,
🍭 lollipop, 🍮 pudding, 🍯 honey pot, 🍼 baby bottle, 🥛 milk glass, ☕ coffee cup, 🫖 teapot, 🍵 teacup,
🍾 champagne bottle, 🍷 wine glass, 🍸 cocktail glass, 🍹 tropical drink, 🍺 beer mug, 🥤 paper cup,
🧋 bubble tea, 🧃 juice box, 🧊 ice cube, 🥢 ~chopsticks, 🍴 ~cutlery, 🥄 spoon, 🔪 kitchen knife, 🫙 jar,
🏺 amphora, 🧂 salt shaker, 🧭 compass, 🏔 mountain, 🌋 volcano, 🏕 campsite, 🏝 island, 🏟 stadium, 🧱 brick wall,
🛖 hut, 🏠 house, 🏥 hospital, 🏦 bank, 🏨 hotel, 🏭 factory, 🏯 pagoda, 🏰 castle, 🗼 tower, 🗽 statue,
⛪ church, 🕌 mosque, 🛕 temple, 🕍 synagogue, ⛩ shrine, ⛲ fountain, ⛺ tent, 🎠 carousel horse,
🎡 ferris wheel, 🎢 roller coaster, 💈 barber pole, 🎪 circus tent, 🛝 slide, 🚂 locomotive, 🚆 train,
🚄 bullet train, 🚌 bus, 🚑 ambulance, 🚒 fire engine, 🚓 police car, 🚕 taxi, 🚗 car, 🚙 jeep, 🛻 pickup truck,
🚚 truck, 🚜 tractor, 🏎 racing car, 🏍 motorcycle, 🛵 motor scooter, 🛴 kick scooter, 🦽 wheelchair, 🛺 rickshaw,
🚲 bicycle, 🛹 skateboard, 🛼 roller skate, 🛢 oil drum, ⛽ fuel pump, 🛞 wheel, 🚨 siren, 🚦 traffic light,
🛑 stop sign, 🚧 barrier, ⚓ anchor, 🛟 lifebuoy, ⛵ sailboat, 🛶 canoe, 🚤 speedboat, 🚢 ship, ✈ airplane,
🪂 parachute, 🚁 helicopter, 🚡 cable car, 🛰 satellite, 🚀 rocket, 🛸 flying saucer, 🛎 service bell,
🧳 suitcase, ⌛ hourglass, ⌚ watch, ⏰ alarm clock, ⏱ stopwatch, 🌙 crescent moon, 🌡 thermometer, ☀ sun,
🪐 planet, ☁ cloud, 🌈 rainbow, 🌪 tornado, 🌂 closed umbrella, ☂ umbrella, ⛱ beach umbrella,
⚡ lightning bolt, ❄ snowflake, ⛄ snowman, ☄ comet, 🔥 fire, 💧 water drop, 🌊 ocean wave, 🌍 globe,
🎃 pumpkin lantern, 🧨 firecracker, 🎈 balloon, 🎉 party popper, 🎐 wind chime, 🎀 ribbon, 🎁 gift box,
🎫 ticket, 🎖 military medal, 🏆 trophy, 🥇 gold medal, ⚽ soccer ball, ⚾ baseball, 🏀 basketball,
🏐 volleyball, 🏈 football, 🎾 tennis ball, 🥏 flying disc, 🎳 ~bowling pins, 🏏 cricket bat, 🏑 hockey stick,
🏸 shuttlecock, 🥊 boxing glove, 🥋 judo suit, 🥅 goal net, ⛳ golf flag, ⛸ ice skate, 🎣 fishing rod,
🤿 diving mask, 🎽 running shirt, 🎿 ski boot, 🛷 sled, 🥌 curling stone, 🎯 dartboard, 🪀 yo-yo, 🪁 kite,
🔫 pistol, 🎱 billiard ball, 🔮 crystal ball, 🪄 magic wand, 🎮 game controller, 🕹 joystick, 🎰 slot machine,
🎲 die, 🧩 puzzle piece, 🧸 teddy bear, 🪅 pinata, 🪆 nesting doll, ♟ chess pawn, 🃏 joker card,
🀄 mahjong tile, 🎭 ~theater masks, 🖼 picture frame, 🎨 palette, 🧵 spool, 🪡 sewing needle, 🧶 ~yarn, 🪢 knot,
👓 ~glasses, 🕶 ~sunglasses, 🥽 ~goggles, 🥼 lab coat, 🦺 safety vest, 👔 necktie, 👕 t-shirt, 👖 ~jeans,
🧣 scarf, 🧤 ~mittens, 🧥 coat, 🧦 ~socks, 👗 dress, 👘 kimono, 🥻 sari, 🩱 swimsuit, 🩲 ~briefs, 🩳 ~shorts,
👙 bikini, 👛 purse, 👜 handbag, 🛍 shopping bag, 🎒 backpack, 🩴 sandal, 👞 shoe, 👟 sneaker, 🥾 hiking boot,
👠 high heel, 🩰 ballet shoe, 👢 cowgirl boot, 👑 crown, 👒 sun hat, 🎩 top hat, 🎓 graduation cap,
🧢 baseball cap, 🪖 army helmet, 📿 ~prayer beads, 💄 lipstick, 💍 diamond ring, 💎 gem, 🔊 loudspeaker, 📣 megaphone,
📯 post horn, 🔔 bell, 🎙 microphone, 🎧 ~headphones, 📻 radio, 🎷 saxophone, 🪗 accordion, 🎸 guitar,
🎹 ~piano keys, 🎺 trumpet, 🎻 violin, 🪕 banjo, 🥁 drum, 🪘 long drum, 📱 smartphone, ☎ telephone,
📠 fax machine, 🔋 battery, 🔌 plug, 💻 laptop, 🖥 desktop computer, 🖨 printer, ⌨ keyboard, 🖱 computer mouse,
💾 floppy disk, 💿 compact disc, 🧮 abacus, 🎥 movie camera, 🎞 film strip, 🎬 clapper board, 📺 television,
📷 camera, 📼 videocassette, 🔍 magnifying glass, 🕯 candle, 💡 light bulb, 🔦 flashlight, 🏮 paper lantern,
🪔 oil lamp, 📖 open book, 📚 ~books, 📓 notebook, 📜 scroll, 📰 newspaper, 🔖 bookmark, 💰 money bag, 🪙 coin,
💵 ~banknotes, 💳 credit card, 🧾 receipt, ✉ envelope, 📦 package, 📫 mailbox, ✏ pencil, 🖋 fountain pen,
🖊 ballpoint pen, 🖌 paintbrush, 🖍 crayon, 💼 briefcase, 📁 folder, 📅 calendar, 📈 chart, 📋 clipboard,
📌 pushpin, 📎 paperclip, 📏 ruler, 📐 set square, ✂ ~scissors, 🗄 file cabinet, 🗑 wastebasket, 🔒 padlock,
🔑 key, 🗝 iron key, 🔨 hammer, 🪓 axe, ⛏ pickaxe, 🗡 dagger, ⚔ ~crossed swords, 💣 bomb, 🪃 boomerang,
🏹 archery bow, 🛡 shield, 🪚 saw, 🔧 wrench, 🪛 screwdriver, 🔩 bolt, ⚙ gear, 🗜 clamp, ⚖ ~scales,
🦯 walking cane, 🔗 chain link, 🪝 hook, 🧰 toolbox, 🧲 magnet, 🪜 ladder, 🧪 test tube, 🧫 petri dish, 🧬 ~dna,
🔬 microscope, 🔭 telescope, 📡 satellite dish, 💉 syringe, 💊 pill, 🩹 bandage, 🩺 stethoscope, 🩼 crutch,
🚪 door, 🪞 mirror, 🪟 window, 🛏 bed, 🛋 couch, 🪑 chair, 🚽 toilet, 🪠 plunger, 🚿 shower, 🛁 bathtub,
🪤 mouse trap, 🪒 razor, 🧴 lotion bottle, 🧷 safety pin, 🧹 broom, 🧺 basket, 🧻 toilet paper, 🪣 bucket,
🧼 ~soap, 🪥 toothbrush, 🧽 sponge, 🧯 fire extinguisher, 🛒 shopping cart, 🚬 cigarette, ⚰ coffin,
🪦 headstone, 💀 skull, 👻 ghost, 👽 alien, 👾 space invader, 🤖 robot, 🧠 brain, 🫁 ~lungs, 🦷 tooth, 🦴 bone,
👁 eye, 👂 ear, 👃 nose, 👄 mouth, 💔 broken heart, 💌 love letter, 🛗 elevator, 🪩 disco ball,
🧿 amulet, 🎊 confetti ball
"""


def _parse() -> tuple[dict[str, str], frozenset[str]]:
    characters, uncounted = {}, set()
    for entry in _TABLE.replace("\n", " ").split(","):
        character, name = entry.strip().split(" ", 1)
        name = name.strip()
        if name.startswith("~"):
            name = name[1:]
            uncounted.add(name)
        if name in characters:
            raise AssertionError(f"two things are called {name!r}")
        characters[name] = character
    return characters, frozenset(uncounted)


CHARACTERS, UNCOUNTED = _parse()  # name -> the emoji drawn for it; names that take "some"

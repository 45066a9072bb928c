"""English words of which none is a part of another, so that finding one in an answer means that one."""

_ADJECTIVES = """
ancient bitter brave bright broken calm careful cheerful chilly clever cloudy clumsy coarse crimson crooked curious
damp dapper dizzy dreamy drowsy dusty eager early elegant empty faint famous fancy fearless feeble fierce flimsy
fluffy foggy fragile frosty gentle giddy gloomy golden graceful grumpy handsome harmless hasty hollow honest hungry
idle jolly jumpy keen lively lonely lucky mellow mighty misty modest narrow nervous noble obedient odd patient playful
polite proud quaint quiet rapid rare reckless rough royal rusty sandy secret serene shabby shallow sharp shiny silent
silly sincere sleepy slender smooth solemn spicy stubborn sturdy subtle swift tender thirsty thoughtful timid tiny
tired tricky ugly vague velvet vivid wandering weary wicked witty wobbly wooden young zealous
"""

_NOUNS = """
acorn airport almond anchor apron artist atlas avenue badge bakery balloon bamboo banjo barrel basket beacon beetle
bicycle biscuit blanket blossom bottle bracelet bridge brush bucket butcher cabin cactus camel candle canyon captain
caravan carpet castle cedar cellar chapel cherry chimney circus clinic clock clover coffee comet copper corridor
cottage cotton cousin crayon cricket crystal curtain cushion dagger daisy dancer desert diamond dolphin donkey dragon
drummer eagle elbow emerald engine envelope falcon farmer feather ferry fiddle finger flute forest fountain fox galaxy
garden garlic gazelle geyser giraffe glacier globe goblin grape guitar hammer harbor hazel helmet hermit hotel hunter
igloo insect island ivory jacket jaguar jewel jigsaw judge jungle kettle kitchen kitten knight ladder lagoon lantern
lemon leopard library lizard lobster locket magnet mango maple marble market meadow melon mermaid mirror monkey mosaic
muffin museum mustard napkin necklace needle nephew nickel notebook oasis ocean octopus olive onion orchard orchid
ostrich otter oyster paddle palace panther parrot peach pebble pelican pencil pepper piano pigeon pillow pirate planet
plumber pocket poem pony potato prairie pumpkin puzzle quarry quilt rabbit raft raven ribbon river robot rocket saddle
sailor salmon sandwich satchel saxophone scarf school seagull shadow shepherd shield shoulder singer skeleton sparrow
spider spinach spoon squirrel stadium statue stove street sultan sunset tailor teacup temple theater thimble thunder
tiger timber tornado towel tractor train trumpet tulip tunnel turtle umbrella uncle valley vase village violin volcano
waffle wagon walnut walrus warden watch weasel whale whistle willow window wizard wolf yogurt zebra
"""

_VERBS = """
admire applaud argue arrive attack balance begin behave borrow bounce bury carve celebrate chase collect compare
confess cough create decide deliver depend describe discover divide drift embrace explain explore fasten forgive
gather glow grumble guess haunt hesitate hop hurry imagine improve invent invite jog juggle kneel knock laugh launch
listen lurk measure mend mumble nod notice obey observe occur offer paint permit pluck polish ponder pretend promise
punish rattle receive refuse rejoice remind repeat rescue scatter scribble shiver shrug sneeze snore solve squeeze
stumble surround swallow tease tickle travel tremble vanish whisper wonder wrestle yawn
"""

ADJECTIVES, NOUNS, VERBS = (tuple(words.split()) for words in (_ADJECTIVES, _NOUNS, _VERBS))

"""Word lists of the phrase extraction.  Owns which words are never a phrase; how they are used is `phrases.py`.

They follow the two lists that OWLv2's paper describes (Minderer et al. 2023, appendix A.2: English stop words, and
generic words found among the most frequent of web alt-texts), which CLOC's VESL reuses (paper appendix C).  The
lists are our own compilation, not a copy.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Function words, in the pieces that a Penn Treebank tokenizer makes ("don't" arrives as "do" and "n't").
STOP_WORDS = _words(
    """
    a an the this that these those each every either neither both all any some such no none another other others same
    own few many more most much less least several enough only just very too so quite rather almost also even still yet
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves one ones someone something anyone anything everyone
    everything nobody nothing who whom whose which what where when why how whoever whatever whichever
    am is are was were be been being have has had having do does did doing done can could may might must shall should
    will would ought need let lets got get gets getting
    and or but nor if then else than as because while although though unless until since whether
    of at by for with without within about against between among into onto through during before after above below to
    from up down in out on off over under around along across behind beside beneath near toward towards upon via per
    again further once here there now not never always often ever
    's 're 've 'll 'd 'm 't n't ca wo ai s t d m o re ve ll y ma
    """
)

# Words about the picture as a file, about the shop or the web page around it, never about what it shows.  Words that
# also name a visible thing ("net", "post", "page", "video" in "video game") stay in.
GENERIC_WORDS = _words(
    """
    image images img imgs photo photos photograph photographs photography pic pics picture pictures
    illustration illustrations illustrated vector vectors clipart artwork render rendering stock royalty royalty-free
    wallpaper wallpapers background backgrounds thumbnail thumbnails screenshot screenshots
    hd uhd 4k 8k resolution high-resolution hi-res pixel pixels quality original
    gif jpg jpeg png svg webp bmp tiff pdf eps psd
    free premium available buy sale sales shop shopping store online order price prices cheap discount wholesale
    shipping delivery diy
    click download downloads upload uploaded watch subscribe description descriptions caption title untitled copyright
    website websites webpage homepage blog blogs url link links www http https com org html uk co ie
    alamy alibaba aliexpress amazon depositphotos dreamstime ebay etsy facebook flickr getty gettyimages google imgur
    instagram istock istockphoto pinterest reddit shutterstock tumblr twitter wikimedia wikipedia wordpress youtube
    porn sex xxx
    """
)

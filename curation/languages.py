"""Captions in ten other languages: small grammars that say what a scene shows, in proper sentences.

A web pool's captions in other languages are true and useful, only not for an
English model; word salad would be too easy a case for a language detector.
Every sentence pattern takes its things in the nominative, so that gender of
noun, article and adjective is all the grammar that is needed.

Tables are strings of `name=form`, an underscore for a space; forms of an
adjective by gender are parted by "/" in the order of the language's `genders`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from curation.scenes import TONES, Scene, Thing


def _table(text: str) -> Mapping[str, str]:
    return {name: form.replace("_", " ") for name, _, form in (entry.partition("=") for entry in text.split())}


@dataclass(frozen=True, kw_only=True)
class Language:
    """One grammar.

    `nouns` ends each form with ":" and its gender; `phrase` orders {article}, {size}, {colour}, {texture}, {noun};
    `one`, `many` ({list}) and `pairs` ({a} left of or above {b}: keys "left", "above") are whole sentences, and
    `ends` close them, for a light and a dark backdrop.
    """

    genders: str
    articles: str
    nouns: Mapping[str, str]
    colours: Mapping[str, str]
    textures: Mapping[str, str]
    sizes: Mapping[str, str]
    phrase: str
    one: tuple[str, ...]
    many: tuple[str, ...]
    pairs: Mapping[str, str]
    ends: tuple[str, str]
    comma: str = ", "
    conjunction: str = " und "
    stop: str = "."


LANGUAGES = {
    "de": Language(
        genders="mfn",
        articles="ein/eine/ein",
        nouns=_table(
            "ball=Kugel:f cube=Würfel:m cone=Kegel:m cylinder=Zylinder:m ring=Ring:m star=Stern:m heart=Herz:n "
            "crescent=Halbmond:m cross=Kreuz:n diamond=Raute:f arrow=Pfeil:m flower=Blume:f mushroom=Pilz:m "
            "fish=Fisch:m house=Haus:n hourglass=Sanduhr:f"
        ),
        colours=_table(
            "red=roter/rote/rotes orange=orangefarbener/orangefarbene/orangefarbenes yellow=gelber/gelbe/gelbes "
            "green=grüner/grüne/grünes turquoise=türkisfarbener/türkisfarbene/türkisfarbenes blue=blauer/blaue/blaues "
            "purple=violetter/violette/violettes pink=rosafarbener/rosafarbene/rosafarbenes "
            "brown=brauner/braune/braunes white=weißer/weiße/weißes black=schwarzer/schwarze/schwarzes"
        ),
        textures=_table(
            "striped=gestreifter/gestreifte/gestreiftes dotted=gepunkteter/gepunktete/gepunktetes "
            "checkered=karierter/karierte/kariertes outlined=umrandeter/umrandete/umrandetes"
        ),
        sizes=_table("small=kleiner/kleine/kleines large=großer/große/großes"),
        phrase="{article} {size} {texture} {colour} {noun}",
        one=("Auf dem Bild ist {list} zu sehen", "Hier sieht man nur eines: {list}", "Das Bild zeigt nur dies: {list}"),
        many=("Auf dem Bild sind {list} zu sehen", "Hier liegen {list}", "Zu sehen sind {list}"),
        pairs=_table("left=Links_ist_{a},_rechts_{b} above=Oben_ist_{a},_unten_{b}"),
        ends=(", der Hintergrund ist hell", ", der Hintergrund ist dunkel"),
    ),
    "nl": Language(
        genders="cn",
        articles="een/een",
        nouns=_table(
            "ball=bal:c cube=kubus:c cone=kegel:c cylinder=cilinder:c ring=ring:c star=ster:c heart=hart:n "
            "crescent=halvemaan:c cross=kruis:n diamond=ruit:c arrow=pijl:c flower=bloem:c mushroom=paddenstoel:c "
            "fish=vis:c house=huis:n hourglass=zandloper:c"
        ),
        colours=_table(
            "red=rode/rood orange=oranje/oranje yellow=gele/geel green=groene/groen turquoise=turquoise/turquoise "
            "blue=blauwe/blauw purple=paarse/paars pink=roze/roze brown=bruine/bruin white=witte/wit black=zwarte/zwart"
        ),
        textures=_table(
            "striped=gestreepte/gestreept dotted=gestippelde/gestippeld checkered=geruite/geruit "
            "outlined=omlijnde/omlijnd"
        ),
        sizes=_table("small=kleine/klein large=grote/groot"),
        phrase="{article} {size} {texture} {colour} {noun}",
        one=("Op de foto is {list} te zien", "Er ligt hier alleen {list}"),
        many=("Op de foto zijn {list} te zien", "Je ziet hier {list} bij elkaar"),
        pairs=_table("left=Links_staat_{a}_en_rechts_{b} above=Bovenaan_staat_{a}_en_daaronder_{b}"),
        ends=(" op een lichte achtergrond", " op een donkere achtergrond"),
        conjunction=" en ",
    ),
    "fr": Language(
        genders="mf",
        articles="un/une",
        nouns=_table(
            "ball=boule:f cube=cube:m cone=cône:m cylinder=cylindre:m ring=anneau:m star=étoile:f heart=cœur:m "
            "crescent=croissant_de_lune:m cross=croix:f diamond=losange:m arrow=flèche:f flower=fleur:f "
            "mushroom=champignon:m fish=poisson:m house=maison:f hourglass=sablier:m"
        ),
        colours=_table(
            "red=rouge/rouge orange=orange/orange yellow=jaune/jaune green=vert/verte turquoise=turquoise/turquoise "
            "blue=bleu/bleue purple=violet/violette pink=rose/rose brown=marron/marron white=blanc/blanche "
            "black=noir/noire"
        ),
        textures=_table("striped=à_rayures dotted=à_pois checkered=à_carreaux outlined=avec_un_contour_épais"),
        sizes=_table("small=petit/petite large=grand/grande"),
        phrase="{article} {size} {noun} {colour} {texture}",
        one=("Sur cette image, on voit {list}", "Il y a seulement {list}"),
        many=("Sur cette image, on voit {list}", "Il y a {list} dans la scène", "Voici {list}"),
        pairs=_table("left=On_voit_à_gauche_{a}_et_à_droite_{b} above=En_haut_il_y_a_{a}_et_en_bas_{b}"),
        ends=(" sur un fond clair", " sur un fond sombre"),
        conjunction=" et ",
    ),
    "es": Language(
        genders="mf",
        articles="un/una",
        nouns=_table(
            "ball=pelota:f cube=cubo:m cone=cono:m cylinder=cilindro:m ring=anillo:m star=estrella:f heart=corazón:m "
            "crescent=media_luna:f cross=cruz:f diamond=rombo:m arrow=flecha:f flower=flor:f mushroom=hongo:m "
            "fish=pez:m house=casa:f hourglass=reloj_de_arena:m"
        ),
        colours=_table(
            "red=rojo/roja orange=naranja/naranja yellow=amarillo/amarilla green=verde/verde "
            "turquoise=turquesa/turquesa blue=azul/azul purple=morado/morada pink=rosa/rosa brown=marrón/marrón "
            "white=blanco/blanca black=negro/negra"
        ),
        textures=_table("striped=a_rayas dotted=de_lunares checkered=a_cuadros outlined=con_borde_grueso"),
        sizes=_table("small=pequeño/pequeña large=grande/grande"),
        phrase="{article} {noun} {colour} {size} {texture}",
        one=("En la imagen se ve {list}", "Aquí hay solamente {list}"),
        many=("En la imagen se ven {list}", "Aquí hay {list}", "La foto muestra {list}"),
        pairs=_table("left=A_la_izquierda_hay_{a}_y_a_la_derecha_{b} above=Arriba_hay_{a}_y_abajo_{b}"),
        ends=(" sobre un fondo claro", " sobre un fondo oscuro"),
        conjunction=" y ",
    ),
    "it": Language(
        genders="mf",
        articles="un/una",
        nouns=_table(
            "ball=palla:f cube=cubo:m cone=cono:m cylinder=cilindro:m ring=anello:m star=stella:f heart=cuore:m "
            "crescent=mezzaluna:f cross=croce:f diamond=rombo:m arrow=freccia:f flower=fiore:m mushroom=fungo:m "
            "fish=pesce:m house=casa:f hourglass=clessidra:f"
        ),
        colours=_table(
            "red=rosso/rossa orange=arancione/arancione yellow=giallo/gialla green=verde/verde "
            "turquoise=turchese/turchese blue=blu/blu purple=viola/viola pink=rosa/rosa brown=marrone/marrone "
            "white=bianco/bianca black=nero/nera"
        ),
        textures=_table("striped=a_righe dotted=a_pois checkered=a_quadretti outlined=con_il_bordo_spesso"),
        sizes=_table("small=piccolo/piccola large=grande/grande"),
        phrase="{article} {size} {noun} {colour} {texture}",
        one=("Nell'immagine si vede {list}", "Qui c'è soltanto {list}"),
        many=("Nell'immagine si vedono {list}", "Qui ci sono {list}", "La foto mostra {list}"),
        pairs=_table("left=A_sinistra_c'è_{a}_e_a_destra_{b} above=In_alto_c'è_{a}_e_in_basso_{b}"),
        ends=(" su uno sfondo chiaro", " su uno sfondo scuro"),
        conjunction=" e ",
    ),
    "pt": Language(
        genders="mf",
        articles="um/uma",
        nouns=_table(
            "ball=bola:f cube=cubo:m cone=cone:m cylinder=cilindro:m ring=anel:m star=estrela:f heart=coração:m "
            "crescent=meia-lua:f cross=cruz:f diamond=losango:m arrow=seta:f flower=flor:f mushroom=cogumelo:m "
            "fish=peixe:m house=casa:f hourglass=ampulheta:f"
        ),
        colours=_table(
            "red=vermelho/vermelha orange=laranja/laranja yellow=amarelo/amarela green=verde/verde "
            "turquoise=turquesa/turquesa blue=azul/azul purple=roxo/roxa pink=cor-de-rosa/cor-de-rosa "
            "brown=marrom/marrom white=branco/branca black=preto/preta"
        ),
        textures=_table("striped=às_riscas dotted=às_bolinhas checkered=aos_quadrados outlined=com_contorno_grosso"),
        sizes=_table("small=pequeno/pequena large=grande/grande"),
        phrase="{article} {noun} {colour} {size} {texture}",
        one=("Na imagem vê-se {list}", "Aqui está apenas {list}"),
        many=("Na imagem veem-se {list}", "Aqui estão {list}", "A foto mostra {list}"),
        pairs=_table("left=À_esquerda_está_{a}_e_à_direita_{b} above=Em_cima_está_{a}_e_embaixo_{b}"),
        ends=(" sobre um fundo claro", " sobre um fundo escuro"),
        conjunction=" e ",
    ),
    "pl": Language(
        genders="mfn",
        articles="//",
        nouns=_table(
            "ball=kula:f cube=sześcian:m cone=stożek:m cylinder=walec:m ring=pierścień:m star=gwiazda:f heart=serce:n "
            "crescent=półksiężyc:m cross=krzyż:m diamond=romb:m arrow=strzałka:f flower=kwiat:m mushroom=grzyb:m "
            "fish=ryba:f house=dom:m hourglass=klepsydra:f"
        ),
        colours=_table(
            "red=czerwony/czerwona/czerwone orange=pomarańczowy/pomarańczowa/pomarańczowe yellow=żółty/żółta/żółte "
            "green=zielony/zielona/zielone turquoise=turkusowy/turkusowa/turkusowe blue=niebieski/niebieska/niebieskie "
            "purple=fioletowy/fioletowa/fioletowe pink=różowy/różowa/różowe brown=brązowy/brązowa/brązowe "
            "white=biały/biała/białe black=czarny/czarna/czarne"
        ),
        textures=_table("striped=w_paski dotted=w_kropki checkered=w_kratkę outlined=z_grubym_konturem"),
        sizes=_table("small=mały/mała/małe large=duży/duża/duże"),
        phrase="{article} {size} {colour} {noun} {texture}",
        one=("Na zdjęciu jest tylko {list}", "Na obrazku widać tu coś takiego: {list}"),
        many=("Na zdjęciu są {list}", "Tu znajdują się {list}"),
        pairs=_table("left=Po_lewej_stronie_jest_{a},_a_po_prawej_{b} above=Na_górze_jest_{a},_a_na_dole_{b}"),
        ends=(" na jasnym tle", " na ciemnym tle"),
        conjunction=" i ",
    ),
    "ru": Language(
        genders="mfnp",
        articles="///",
        nouns=_table(
            "ball=шар:m cube=куб:m cone=конус:m cylinder=цилиндр:m ring=кольцо:n star=звезда:f heart=сердце:n "
            "crescent=полумесяц:m cross=крест:m diamond=ромб:m arrow=стрелка:f flower=цветок:m mushroom=гриб:m "
            "fish=рыба:f house=дом:m hourglass=песочные_часы:p"
        ),
        colours=_table(
            "red=красный/красная/красное/красные orange=оранжевый/оранжевая/оранжевое/оранжевые "
            "yellow=жёлтый/жёлтая/жёлтое/жёлтые green=зелёный/зелёная/зелёное/зелёные "
            "turquoise=бирюзовый/бирюзовая/бирюзовое/бирюзовые blue=синий/синяя/синее/синие "
            "purple=фиолетовый/фиолетовая/фиолетовое/фиолетовые pink=розовый/розовая/розовое/розовые "
            "brown=коричневый/коричневая/коричневое/коричневые white=белый/белая/белое/белые "
            "black=чёрный/чёрная/чёрное/чёрные"
        ),
        textures=_table("striped=в_полоску dotted=в_горошек checkered=в_клетку outlined=с_толстым_контуром"),
        sizes=_table("small=маленький/маленькая/маленькое/маленькие large=большой/большая/большое/большие"),
        phrase="{article} {size} {colour} {noun} {texture}",
        one=("На картинке только {list}", "Здесь только {list}"),
        many=("На картинке {list}", "Здесь находятся {list}", "На фотографии {list}"),
        pairs=_table("left=Слева_{a},_а_справа_{b} above=Сверху_{a},_а_снизу_{b}"),
        ends=(" на светлом фоне", " на тёмном фоне"),
        conjunction=" и ",
    ),
    "zh": Language(
        genders="个朵条座颗",
        articles="一个/一朵/一条/一座/一颗",
        nouns=_table(
            "ball=球:个 cube=立方体:个 cone=圆锥:个 cylinder=圆柱:个 ring=圆环:个 star=星星:颗 heart=爱心:颗 "
            "crescent=月牙:个 cross=十字:个 diamond=菱形:个 arrow=箭头:个 flower=花:朵 mushroom=蘑菇:个 "
            "fish=鱼:条 house=房子:座 hourglass=沙漏:个"
        ),
        colours=_table(
            "red=红色的 orange=橙色的 yellow=黄色的 green=绿色的 turquoise=青绿色的 blue=蓝色的 purple=紫色的 "
            "pink=粉色的 brown=棕色的 white=白色的 black=黑色的"
        ),
        textures=_table("striped=条纹 dotted=圆点 checkered=格子 outlined=带边框的"),
        sizes=_table("small=小小的 large=大大的"),
        phrase="{article}{size}{colour}{texture}{noun}",
        one=("图中只有{list}", "这张图片里有{list}"),
        many=("图中有{list}", "这张图片里有{list}", "这里可以看到{list}"),
        pairs=_table("left=左边是{a},右边是{b} above=上面是{a},下面是{b}"),
        ends=(",背景是浅色的", ",背景是深色的"),
        comma="、",
        conjunction="和",
        stop="。",
    ),
    "ja": Language(
        genders="x",
        articles="",
        nouns=_table(
            "ball=ボール:x cube=立方体:x cone=円錐:x cylinder=円柱:x ring=輪:x star=星:x heart=ハート:x "
            "crescent=三日月:x cross=十字:x diamond=ひし形:x arrow=矢印:x flower=花:x mushroom=キノコ:x "
            "fish=魚:x house=家:x hourglass=砂時計:x"
        ),
        colours=_table(
            "red=赤い orange=オレンジ色の yellow=黄色い green=緑の turquoise=青緑色の blue=青い purple=紫の "
            "pink=ピンクの brown=茶色の white=白い black=黒い"
        ),
        textures=_table("striped=縞模様の dotted=水玉模様の checkered=市松模様の outlined=縁取りのある"),
        sizes=_table("small=小さな large=大きな"),
        phrase="{article}{size}{colour}{texture}{noun}",
        one=("この絵には{list}だけがあります", "写真に{list}が写っています"),
        many=("この絵には{list}があります", "写真に{list}が写っています"),
        pairs=_table("left=左に{a}、右に{b}があります above=上に{a}、下に{b}があります"),
        ends=("。背景は明るいです", "。背景は暗いです"),
        comma="、",
        conjunction="と",
        stop="。",
    ),
}


def _describe(random: Random, language: Language, thing: Thing) -> str:
    noun, _, gender = language.nouns[thing.shape].rpartition(":")
    k = language.genders.index(gender)

    def form(forms: str) -> str:
        return forms.split("/")[k] if "/" in forms else forms

    size = language.sizes.get(thing.size, "") if random.random() < 0.5 else ""
    phrase = language.phrase.format(
        article=form(language.articles),
        size=form(size),
        colour=form(language.colours[thing.colour]),
        texture=form(language.textures.get(thing.texture, "")),
        noun=noun,
    )
    return " ".join(phrase.split())


def translate(random: Random, scene: Scene) -> tuple[str, str]:
    """A true caption of the scene in one of `LANGUAGES`: (language code, sentence)."""
    code = random.choice(list(LANGUAGES))
    language = LANGUAGES[code]
    things = list(scene.things)
    random.shuffle(things)
    if len(things) == 2:
        across, down = things[1].x - things[0].x, things[1].y - things[0].y
        if (across if abs(across) > abs(down) else down) < 0:
            things.reverse()
        name = "left" if abs(across) > abs(down) else "above"
        a, b = (_describe(random, language, thing) for thing in things)
        text = language.pairs[name].format(a=a, b=b)
    else:
        phrases = [_describe(random, language, thing) for thing in things]
        listed = phrases[0]
        if len(phrases) > 1:
            listed = language.comma.join(phrases[:-1]) + language.conjunction + phrases[-1]
        text = random.choice(language.one if len(phrases) == 1 else language.many).format(list=listed)
    if random.random() < 0.5:
        # A horizon has two tones, so that it is light or dark only where both are.
        tones = [sum(TONES[tone]) for tone in (scene.tone, scene.second_tone)]
        if all(tone > 480 for tone in tones) or all(tone < 380 for tone in tones):
            text += language.ends[tones[0] < 380]
    return code, text + (language.stop if random.random() < 0.7 else "")

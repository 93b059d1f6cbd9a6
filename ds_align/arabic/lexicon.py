"""Words that give a dialect away, as data. Spelled as people write; the scorer compares folded keys.

The choice is ours, from what the works named in `sources` describe; no list was taken over. A word stands
here only if it is rare in the standard language and in the other dialects; homographs of standard words
(Egyptian awi/qawi "strong", Gulf abi "my father", Levantine yalli "follows") are left out or weigh 1.
"""

from __future__ import annotations

from dataclasses import dataclass

STRONG = 2
WEAK = 1
# Described: MADAR (Bouamor et al. 2018), the NADI shared tasks (Abdul-Mageed et al. 2020-), AOC (Zaidan and
# Callison-Burch 2011, "The Arabic Online Commentary Dataset"; 2014, "Arabic Dialect Identification").
_CORPORA = ("MADAR 2018", "NADI 2020-2023", "AOC 2011, 2014")


@dataclass(frozen=True, slots=True)
class Markers:
    """Words of one label: a strong one is enough for the label, a weak one needs another beside it."""

    strong: str
    weak: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WordForm:
    """A regular expression over a whole folded word, and what such a word weighs."""

    regex: str
    weights: dict[str, int]


@dataclass(frozen=True, slots=True)
class Phrase:
    """One of the words `first`, then a regular expression over the next one or two folded words ("": any),
    and not one of the words `not_after` before it.
    """

    first: str
    then: str
    weights: dict[str, int]
    not_after: str = ""


MARKERS = {
    "egy": Markers(
        strong="""
            عايز عايزة عايزين عاوز عاوزة عاوزين إزيك إزيكم إزيكو إزاي ازايك ده كده كدا كدهو دلوقتي دلوقت
            النهارده النهاردة انهارده انهاردة بتاع بتاعة بتاعت بتاعي بتاعتي بتاعك بتاعتك بتاعه بتاعها بتاعتها
            بتاعنا بتوع أوي مفيش مافيش محدش برضه بقالي بقالك بقاله بقالنا وحشتني وحشتيني وحشتوني مستني
            مستنية مستنيين كويس كويسة كويسين ترابيزة اشمعنى كوباية إزازة والنبي اديني اديله هاتلي بكام
            بهزر بيهزر هزار بيذاكر بنذاكر بتذاكر بتفرج بيتفرج بنتفرج اتخانق بيتخانق
        """,
        weak="""
            إيه دي ليه علشان امبارح برضو بص بصي الواد الراجل صحابي حضرتك ماتش أذاكر عربيتي بلاش كام بكرة
            امتى عيان حتة
        """,
        sources=("Badawi and Hinds 1986 (dictionary)", "Woidich 2006 (Cairene grammar)", *_CORPORA),
    ),
    "lev": Markers(
        strong="""
            شو هلق هلقيت لهلق بدي بدك بده بدها بدنا بدكن بدكم بدهم هيك لهيك هيدا هيدي هيدول هديك هاداك منيح
            منيحة مناح مبارح هونيك قديش أديش قديه إيمتى عنجد كرمال مشان منشان زلمة الزلمة ختيار الختيار فيني
            بركي لعنا أجا اجيت إجو بنوب نحنا هنن كيفكن تبعي تبعو بيصير متلك متلي بكير صرلي صرلك
            هالحكي يسلمو عالبيت عالبحر عالسوق عالضيعة عالغدا عالطريق
        """,
        weak="""
            هون كتير حدا لسا بكرا هاد هاي هداك شي شوي انو لأنو كلن معكن عندكن اجت كيفك اشتقتلك ضيعة بحكي
            بيحكي بتحكي بنحكي صارلي إلها إلو لإلو المسا الولاد تبعك تبعنا
        """,
        sources=("Cowell 1964 (Syrian grammar)", "Brustad 2000 (four dialects)", *_CORPORA),
    ),
    "glf": Markers(
        strong="""
            أبغى ابغي تبغى تبغين يبغى نبغى يبغون تبغون تبي يبي تبون يبون نبون للحين هالحين اللحين
            وايد شلون شلونك شلونكم شلونه شلونها شلونج شخبارك شخباركم شفيك شفيه شفيها شفيكم وش وشو وشلون
            وشفيك منو انزين باجر مب مهب موب چذي جذي كذي حقتي حقت حقتك ذيك هذول هذولا عساك عساكم خلنا تيون
            ييون يايين تييب اييب أييب يسوون تسوون شتسوي شسوي شنسوي شتبي مدري مادري اهني صج أشوى شدعوه
            خوش ماكو أكو شكو نتقهوى بنتقهوى مستانس يبيله يبغاله
        """,
        weak="""
            ايش شنو ودي زين يسوي تسوي نسوي أسوي سويت عقب توني توه عيالي ديوانية الديوانية تراني تراك
            هني ياي حياك جوالك جوالي حريم
        """,
        sources=(
            "Holes 1990 (Gulf grammar)",
            "Qafisheh 1977 (Gulf grammar)",
            "Ingham 1994 (Najdi)",
            *_CORPORA,
        ),
    ),
    "mgr": Markers(
        strong="""
            واش بزاف بالزاف دابا ديال ديالي ديالك ديالو ديالها ديالنا ديالكم ديالهم كيفاش علاش شحال وقتاش
            فوقاش شكون حيت هضرة الهضرة ماكاين ماكاينش راني رانا باش برشة برشا شنية شنوة شنوا قداش
            يزي متاعي متاعك متاعها متاعو زوين زوينة زوينين مزيان مزيانة وخا واخا غادي طوموبيل طونوبيل سيمانة
            السيمانة الدراري تسناني هكا هكاك هادشي مانيش ماكش ماراكش كيداير خويا أصاحبي نتوما هوما كيما بلاصة
            شويا ضروك دروك ماثماش مفماش خاصك خاصني نعيطلك
        """,
        weak="""
            راك راه راهو راهي راكم متاع توا باهي غدوة مليح عفاك زنقة الزنقة كاملين سولت لاباس بغيت كلشي البارح
            هادي هاذا هاذي هاذ ثما ندير نتا نتي حنا باللي ديما أتاي شنو هاد عيطت
        """,
        sources=(
            "Harrell 1962 (Moroccan grammar)",
            "Caubet 1993 (Moroccan)",
            "Gibson 2009 (Tunis Arabic)",
            *_CORPORA,
        ),
    ),
    "msa": Markers(
        strong="""
            سوف لن الذي التي الذين اللذان اللذين اللتان اللتين اللواتي اللاتي ليس ليست ليسوا لست لسنا لقد لكي
            لم ولم فلم هل ماذا لماذا أين هؤلاء ينبغي نحن حينما فإنه فإنها فإن بأنه بأنها إنما لعل ريثما
            سيكون ستكون سيتم ستتم سيقوم ستقوم سأكون سنكون سيصبح ستصبح سأكتب سنقوم سيؤدي سأقوم سنجد
        """,
        weak="""
            إن أنه أنها أنهم إنه إنها قد وقد فقد إذ حيث هذه ذلك تلك أيضا عندما بينما كما كي لدي لديه لديها
            لدينا يجب منذ خلال بسبب إلى ولكن حول وفقا بالإضافة يعتبر تعتبر يعد تعد تقع يقع أعلن أعلنت
            أثناء نظرا ثم يمكنك يمكنه يمكننا أشار أشارت تشير كلا حتما لأن بالقرب يوميا
        """,
        sources=("Ryding 2005 (reference grammar)", "Badawi, Carter and Gully 2016 (grammar)"),
    ),
}
# What several dialects have in common: it speaks against the standard language, and one point for each.
SHARED = (
    ("اللي زي يلا يالله فلوس شوية زعلان زعلانة معاك معاه", ("egy", "lev", "glf", "mgr")),
    ("عشان علشان كمان ايوه معلش احنا إحنا انتو مين ياريت", ("egy", "lev", "glf")),
    ("مش ماشي", ("egy", "lev", "mgr")),
    ("ليش مو هالسنة هالبنت هالولد هذيك", ("lev", "glf")),
    ("وين منين شي", ("lev", "glf", "mgr")),
    ("فين", ("egy", "mgr")),
    ("كتير لسه بيجي بتيجي تيجي", ("egy", "lev")),
    ("حنا البارح بغيت هذي", ("glf", "mgr")),
    ("ايش", ("lev", "glf")),
)
# Stems of frequent verbs, for forms that no standard word has: ha- (future), b- (present), k- (present).
_FUTURE = "عمل روح قول شوف كون جيب كتب عرف حصل بقى خلي قدر خلص سافر تكلم حكي نزل طلع رجع لعب فضل جي بعت نام"
_PRESENT = "قول اكل عمل روح شوف حب عرف فهم لعب شتغل درس كتب جيب سال نزل طلع رجع خلص تكلم قدر سمع فكر نام شرب"
_MOROCCAN = "دير قول هضر مشي لعب شوف عرف بغي خدم قلب تسنى تسناو سكن بكي جي ضحك قرا كتب شرب"


def _stems(text: str) -> str:
    return "|".join(text.replace("ى", "ي").split())


WORD_FORMS = (
    WordForm(rf"ه[يتن]?(?:{_stems(_FUTURE)})(?:و|وا|ي|ه|ها|ك|لك|له)?", {"egy": STRONG}),
    WordForm(r"و?م\w{3,}(?:تش|هاش|لكش|لوش)", {"egy": WEAK, "mgr": WEAK}),
    WordForm(r"و?ما\w{3,}ش", {"egy": WEAK, "mgr": WEAK}),
    WordForm(rf"ب[يتن](?:{_stems(_PRESENT)})(?:و|وا|ي|ه|ها)?", {"egy": WEAK, "lev": WEAK}),
    WordForm("من(?:روح|شوف|حكي|عرف|فهم|حب|نام|اكل|بيع)(?:و|ه|ها)?", {"lev": STRONG}),
    WordForm(rf"ك[يتن](?:{_stems(_MOROCCAN)})و?", {"mgr": STRONG}),
    WordForm(r"ن(?!دعو|رجو|شكو|يكو)\w{3,}و", {"mgr": WEAK}),
)
PHRASES = (
    Phrase("عامل عاملة عاملين", "ايه", {"egy": STRONG}),
    Phrase("خلي", "بالك", {"egy": STRONG}),
    Phrase("يا", "عم|واد|ابني", {"egy": WEAK}),
    Phrase("اليومين الناس العيال الاتنين", "دول", {"egy": STRONG}),
    Phrase("لحد", "ما", {"egy": WEAK, "lev": WEAK}),
    Phrase("ما", r"(?!يعيش|تعيش|نعيش|اعيش)\w{3,}ش", {"egy": WEAK, "mgr": WEAK}),
    Phrase("عم", r"[بيتنف]\w{2,}", {"lev": STRONG}, not_after="يا"),
    Phrase("رح", r"(?!ال)[يتنا]\w{2,}", {"lev": STRONG}),
    Phrase("عن", "جد", {"lev": WEAK}),
    Phrase("ما", "في(?:ني|ك|ها)? (?:حدا|شي)", {"lev": WEAK}),
    Phrase("هلا", "والله", {"glf": STRONG}),
    Phrase("يا", "خي", {"glf": WEAK}),
    # "My father", where a name follows.
    Phrase("ابي", r"ا(?!ل|حمد|براهيم|سماعيل)\w{2,}", {"glf": STRONG}),
    Phrase("ودي", r"ا(?!ل)\w{2,}", {"glf": STRONG}),
    # "At that time" of the standard language.
    Phrase("الحين والحين", "", {"glf": STRONG}, not_after="ذلك هذا لك"),
    Phrase("هاد", "الشي", {"mgr": STRONG}),
    Phrase("ما شنو اش واش", "كاين[هش]?", {"mgr": WEAK}),
    Phrase("ما", r"ه[وي]|ال\w{3,}", {"msa": STRONG}),
    Phrase("من", "ه[وي]", {"msa": WEAK}),
    Phrase("من", "اجل", {"msa": WEAK}),
    Phrase("علي", "الرغم", {"msa": WEAK}),
    Phrase("يمكن", "ان", {"msa": WEAK}),
)

"""Topics of the demonstration data: numbers, colours, opposites and tools."""

from __future__ import annotations

from ds_align.demo.lexicon import Entity, Topic, read_entities, read_patterns


def _successors(numbers: tuple[int, ...]) -> tuple[Entity, ...]:
    """Return each number with the one after it, in digits, which both languages share."""
    return tuple(
        Entity({"en": str(number), "ar": str(number)}, {"en": str(number + 1), "ar": str(number + 1)})
        for number in numbers
    )


NUMBERS = Topic(
    "numbers",
    {
        "train": _successors((12, 15, 17, 21, 24, 26, 28, 33, 35, 37, 42, 44, 46, 51, 53, 57)),
        "heldout": _successors((62, 64, 68, 73, 75, 81, 86, 92)),
    },
    {
        "train": read_patterns(
            """
            Which number comes after {x}? | ما العدد الذي يأتي بعد {x}؟
            What is the next number after {x}? | ما هو العدد التالي للعدد {x}؟
            What do I get when I add one to {x}? | على ماذا أحصل إذا أضفت واحدًا إلى {x}؟
            Please count one step up from {x}. | عدّ من فضلك خطوة واحدة بعد {x}.
            """,
            """
            The next number is {y}. | العدد التالي هو {y}.
            After it comes {y}. | بعده يأتي {y}.
            Adding one gives {y}. | إضافة واحد تعطي {y}.
            The answer is {y}. | الجواب هو {y}.
            """,
        ),
        "heldout": read_patterns(
            """
            I had {x} coins and found one more: how many now? | كان عندي {x} قطعة نقدية ووجدت أخرى، فكم عندي؟
            How much is {x} plus one? | كم يساوي {x} زائد واحد؟
            """,
            """
            The number is {y}. | العدد هو {y}.
            The next answer is {y}. | الجواب التالي هو {y}.
            """,
        ),
    },
)

COLOURS = Topic(
    "colours",
    {
        "train": read_entities("""
            grass | العشب | green | الأخضر
            snow | الثلج | white | الأبيض
            the sky | السماء | blue | الأزرق
            coal | الفحم | black | الأسود
            the sun | الشمس | yellow | الأصفر
            a tomato | الطماطم | red | الأحمر
            a carrot | الجزر | orange | البرتقالي
            a banana | الموز | yellow | الأصفر
            a strawberry | الفراولة | red | الأحمر
            cotton | القطن | white | الأبيض
            a cucumber | الخيار | green | الأخضر
            a crow | الغراب | black | الأسود
            a flamingo | طائر الفلامنغو | pink | الوردي
            a violet | زهر البنفسج | purple | البنفسجي
            salt | الملح | white | الأبيض
            mint | النعناع | green | الأخضر
        """),
        "heldout": read_entities("""
            a cherry | الكرز | red | الأحمر
            a lemon | الليمون | yellow | الأصفر
            spinach | السبانخ | green | الأخضر
            a pumpkin | اليقطين | orange | البرتقالي
            chalk | الطباشير | white | الأبيض
            a swan | البجع | white | الأبيض
            tar | القطران | black | الأسود
            the ocean | المحيط | blue | الأزرق
        """),
    },
    {
        "train": read_patterns(
            """
            What color is {x}? | ما لون {x}؟
            What is the usual color of {x}? | ما هو اللون المعروف عن {x}؟
            Which color does {x} have? | بأي لون نعرف {x}؟
            I want to paint {x}: which color do I use? | أريد أن أرسم {x}، فأي لون أستخدم؟
            """,
            """
            The color is {y}. | اللون هو {y}.
            Its usual color is {y}. | اللون المعروف هو {y}.
            We know it by the color {y}. | نعرف ذلك باللون {y}.
            Use the color {y}. | استخدم اللون {y}.
            """,
        ),
        "heldout": read_patterns(
            """
            Describe {x} to a child who loves drawing. | صف {x} لطفل يحب الرسم والتلوين.
            Which pencil should I take for {x}? | أي قلم تلوين آخذ من أجل {x}؟
            """,
            """
            We use the color {y}. | نستخدم اللون {y}.
            We know the color {y}. | نعرف اللون {y}.
            """,
        ),
    },
)

OPPOSITES = Topic(
    "opposites",
    {
        "train": read_entities("""
            big | كبير | small | صغير
            hot | حار | cold | بارد
            long | طويل | short | قصير
            fast | سريع | slow | بطيء
            new | جديد | old | قديم
            rich | غني | poor | فقير
            strong | قوي | weak | ضعيف
            easy | سهل | difficult | صعب
            near | قريب | far | بعيد
            open | مفتوح | closed | مغلق
            full | ممتلئ | empty | فارغ
            clean | نظيف | dirty | متسخ
            heavy | ثقيل | light | خفيف
            high | مرتفع | low | منخفض
            dry | جاف | wet | مبتل
            happy | سعيد | sad | حزين
        """),
        "heldout": read_entities("""
            huge | ضخم | small | صغير
            boiling | مغلي | cold | بارد
            towering | شاهق | low | منخفض
            modern | حديث | old | قديم
            wealthy | ثري | poor | فقير
            sturdy | متين | weak | ضعيف
            simple | بسيط | difficult | صعب
            cheerful | مسرور | sad | حزين
        """),
    },
    {
        "train": read_patterns(
            """
            What is the opposite of "{x}"? | ما عكس كلمة «{x}»؟
            Which word is the opposite of "{x}"? | أي كلمة هي عكس كلمة «{x}»؟
            Give me a word with the opposite meaning of "{x}". | أعطني كلمة معناها عكس «{x}».
            How do I say the opposite of "{x}"? | كيف أقول عكس «{x}»؟
            """,
            """
            The opposite is "{y}". | العكس هو «{y}».
            The word "{y}" is the opposite. | كلمة «{y}» هي العكس.
            You can say "{y}". | يمكنك أن تقول «{y}».
            We use the word "{y}". | نستخدم كلمة «{y}».
            """,
        ),
        "heldout": read_patterns(
            """
            I study "{x}" and look for its antonym. | أدرس كلمة «{x}» وأبحث عن ضدها.
            Please replace "{x}" by the contrary term. | ضع من فضلك اللفظ المضاد بدلًا من «{x}».
            """,
            """
            The opposite word is "{y}". | كلمة العكس هي «{y}».
            You can use the word "{y}". | يمكنك أن تستخدم كلمة «{y}».
            """,
        ),
    },
)

TOOLS = Topic(
    "tools",
    {
        "train": read_entities("""
            a key | المفتاح | opening doors | فتح الأبواب
            a knife | السكين | cutting food | تقطيع الطعام
            a pen | القلم | writing notes | كتابة الملاحظات
            a broom | المكنسة | sweeping the floor | كنس الأرض
            a hammer | المطرقة | driving nails | دق المسامير
            a ruler | المسطرة | measuring length | قياس الطول
            a watch | الساعة | telling the time | معرفة الوقت
            a lamp | المصباح | lighting the room | إضاءة الغرفة
            a camera | آلة التصوير | taking pictures | التقاط الصور
            a telescope | التلسكوب | watching the stars | مراقبة النجوم
            an oven | الفرن | baking dough | خبز العجين
            a fridge | الثلاجة | cooling food | تبريد الطعام
            a needle | الإبرة | sewing clothes | خياطة الملابس
            a saw | المنشار | cutting wood | قطع الخشب
            a map | الخريطة | finding the way | معرفة الطريق
            a scale | الميزان | weighing goods | وزن البضائع
        """),
        "heldout": read_entities("""
            a pencil | قلم الرصاص | writing notes | كتابة الملاحظات
            a candle | الشمعة | lighting the room | إضاءة الغرفة
            a tape measure | شريط القياس | measuring length | قياس الطول
            a clock | ساعة الحائط | telling the time | معرفة الوقت
            a compass | البوصلة | finding the way | معرفة الطريق
            an axe | الفأس | cutting wood | قطع الخشب
            a sewing machine | آلة الخياطة | sewing clothes | خياطة الملابس
            a freezer | المجمّد | cooling food | تبريد الطعام
        """),
    },
    {
        "train": read_patterns(
            """
            What is {x} used for? | فيمَ نستخدم {x}؟
            What is the purpose of {x}? | ما الغرض من {x}؟
            Why do we need {x}? | لماذا نحتاج إلى {x}؟
            What is {x} useful for? | ما فائدة {x}؟
            """,
            """
            We use it for {y}. | نستخدم ذلك في {y}.
            The purpose is {y}. | الغرض هو {y}.
            People need it for {y}. | يحتاج الناس إلى ذلك من أجل {y}.
            It is useful for {y}. | الفائدة هي {y}.
            """,
        ),
        "heldout": read_patterns(
            """
            I found {x} at home, so how does it serve me? | وجدت {x} في البيت، فكيف أستفيد من ذلك؟
            Explain the benefit of {x} in a few words. | اشرح المنفعة من {x} في كلمات قليلة.
            """,
            """
            People use it for {y}. | يستخدم الناس ذلك في {y}.
            We need it for {y}. | نحتاج إلى ذلك من أجل {y}.
            """,
        ),
    },
)

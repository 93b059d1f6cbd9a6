"""Topics of the demonstration data: cities, animals, foods and jobs."""

from __future__ import annotations

from ds_align.demo.lexicon import Topic, read_entities, read_patterns

CITIES = Topic(
    "cities",
    {
        "train": read_entities("""
            Cairo | القاهرة | Egypt | مصر
            Baghdad | بغداد | Iraq | العراق
            Damascus | دمشق | Syria | سوريا
            Casablanca | الدار البيضاء | Morocco | المغرب
            Tunis | تونس العاصمة | Tunisia | تونس
            Riyadh | الرياض | Saudi Arabia | السعودية
            Paris | باريس | France | فرنسا
            Rome | روما | Italy | إيطاليا
            Madrid | مدريد | Spain | إسبانيا
            Berlin | برلين | Germany | ألمانيا
            Tokyo | طوكيو | Japan | اليابان
            Beijing | بكين | China | الصين
            Istanbul | إسطنبول | Turkey | تركيا
            Mumbai | مومباي | India | الهند
            Toronto | تورونتو | Canada | كندا
            Sydney | سيدني | Australia | أستراليا
        """),
        "heldout": read_entities("""
            Alexandria | الإسكندرية | Egypt | مصر
            Basra | البصرة | Iraq | العراق
            Aleppo | حلب | Syria | سوريا
            Marrakesh | مراكش | Morocco | المغرب
            Milan | ميلانو | Italy | إيطاليا
            Munich | ميونخ | Germany | ألمانيا
            Osaka | أوساكا | Japan | اليابان
            Montreal | مونتريال | Canada | كندا
        """),
    },
    {
        "train": read_patterns(
            """
            Which country is {x} in? | في أي دولة تقع مدينة {x}؟
            Where is {x} located? | أين تقع {x}؟
            What country does {x} belong to? | إلى أي بلد تنتمي مدينة {x}؟
            In which country can I find the city of {x}? | في أي بلد أجد مدينة {x}؟
            """,
            """
            It is in {y}. | هي في {y}.
            The city is located in {y}. | تقع المدينة في {y}.
            You can find it in {y}. | يمكنك أن تجدها في {y}.
            The country is {y}. | البلد هو {y}.
            """,
        ),
        "heldout": read_patterns(
            """
            Tell me the country of {x}, please. | أخبرني من فضلك ببلد مدينة {x}.
            If I travel to {x}, which nation will I visit? | إذا سافرت إلى {x} فأي دولة سأزور؟
            """,
            """
            The city is in {y}. | المدينة في {y}.
            You can find the city in {y}. | يمكنك أن تجد المدينة في {y}.
            """,
        ),
    },
)

ANIMALS = Topic(
    "animals",
    {
        "train": read_entities("""
            the lion | الأسد | the savanna | السافانا
            the camel | الجمل | the desert | الصحراء
            the monkey | القرد | the forest | الغابة
            the dolphin | الدلفين | the sea | البحر
            the crocodile | التمساح | the river | النهر
            the wolf | الذئب | the forest | الغابة
            the penguin | البطريق | the ice of the south | جليد الجنوب
            the elephant | الفيل | the savanna | السافانا
            the fox | الثعلب | the forest | الغابة
            the shark | القرش | the sea | البحر
            the eagle | النسر | the mountains | الجبال
            the frog | الضفدع | the pond | البركة
            the bat | الخفاش | the cave | الكهف
            the squirrel | السنجاب | the forest | الغابة
            the octopus | الأخطبوط | the sea | البحر
            the scorpion | العقرب | the desert | الصحراء
        """),
        "heldout": read_entities("""
            the bear | الدب | the forest | الغابة
            the whale | الحوت | the sea | البحر
            the tiger | النمر | the forest | الغابة
            the parrot | الببغاء | the forest | الغابة
            the hippopotamus | فرس النهر | the river | النهر
            the gazelle | الغزال | the savanna | السافانا
            the mountain goat | الماعز الجبلي | the mountains | الجبال
            the snake | الثعبان | the desert | الصحراء
        """),
    },
    {
        "train": read_patterns(
            """
            Where does {x} live? | أين يعيش {x}؟
            What is the home of {x}? | ما هو موطن {x}؟
            What is the natural habitat of {x}? | ما هو الموطن الطبيعي الذي يعيش فيه {x}؟
            In what place can we see {x} in nature? | في أي مكان نرى {x} في الطبيعة؟
            """,
            """
            It lives in {y}. | يعيش في {y}.
            Its home is {y}. | موطنه هو {y}.
            We can see it in {y}. | يمكننا أن نراه في {y}.
            The natural habitat is {y}. | الموطن الطبيعي هو {y}.
            """,
        ),
        "heldout": read_patterns(
            """
            Tell me which environment suits {x}. | أخبرني أي بيئة تناسب {x}.
            A friend is searching for {x}: where should he look? | صديقي يبحث عن {x}، فأين ينبغي أن ينظر؟
            """,
            """
            We can find it in {y}. | يمكننا أن نجده في {y}.
            Its natural home is {y}. | موطنه الطبيعي هو {y}.
            """,
        ),
    },
)

FOODS = Topic(
    "foods",
    {
        "train": read_entities("""
            bread | الخبز | flour | الدقيق
            cheese | الجبن | milk | الحليب
            falafel | الفلافل | chickpeas | الحمص
            omelette | عجة البيض | eggs | البيض
            chocolate | الشوكولاتة | cocoa | الكاكاو
            tahini | الطحينة | sesame | السمسم
            sushi | السوشي | rice | الأرز
            pasta | المعكرونة | wheat | القمح
            popcorn | الفشار | corn | الذرة
            ketchup | الكاتشب | tomatoes | الطماطم
            tofu | التوفو | soybeans | فول الصويا
            tabbouleh | التبولة | parsley | البقدونس
            kebab | الكباب | meat | اللحم
            couscous | الكسكس | semolina | السميد
            porridge | العصيدة | oats | الشوفان
            marmalade | المرملاد | oranges | البرتقال
        """),
        "heldout": read_entities("""
            yogurt | الزبادي | milk | الحليب
            butter | الزبدة | milk | الحليب
            shawarma | الشاورما | meat | اللحم
            risotto | الريزوتو | rice | الأرز
            biryani | البرياني | rice | الأرز
            shakshuka | الشكشوكة | tomatoes | الطماطم
            basbousa | البسبوسة | semolina | السميد
            tortilla | التورتيلا | corn | الذرة
        """),
    },
    {
        "train": read_patterns(
            """
            What is {x} made from? | من أي شيء نصنع {x}؟
            What is the main ingredient of {x}? | ما هو المكوّن الرئيسي في {x}؟
            What do I need to make {x}? | ماذا أحتاج لتحضير {x}؟
            Which ingredient is most important in {x}? | ما أهم مكوّن في {x}؟
            """,
            """
            We make it from {y}. | نصنع ذلك من {y}.
            The main ingredient is {y}. | المكوّن الرئيسي هو {y}.
            You need {y} to make it. | تحتاج إلى {y} لتحضير ذلك.
            The most important part is {y}. | أهم مكوّن هو {y}.
            """,
        ),
        "heldout": read_patterns(
            """
            I am cooking {x} today, so what should I buy first? | سأطبخ {x} اليوم، فماذا أشتري أولًا؟
            Name the ingredient that a cook uses for {x}. | اذكر المكوّن الذي يستعمله الطباخ في {x}.
            """,
            """
            The most important ingredient is {y}. | أهم مكوّن في ذلك هو {y}.
            You need {y} for it. | تحتاج إلى {y} من أجل ذلك.
            """,
        ),
    },
)

JOBS = Topic(
    "jobs",
    {
        "train": read_entities("""
            a teacher | المعلّم | a school | المدرسة
            a doctor | الطبيب | a hospital | المستشفى
            a farmer | المزارع | a farm | المزرعة
            a cook | الطباخ | a kitchen | المطبخ
            a judge | القاضي | a court | المحكمة
            a pharmacist | الصيدلي | a pharmacy | الصيدلية
            a baker | الخبّاز | a bakery | المخبز
            a sailor | البحّار | a ship | السفينة
            an actor | الممثّل | a theatre | المسرح
            a scientist | العالِم | a laboratory | المختبر
            a waiter | النادل | a restaurant | المطعم
            an accountant | المحاسب | an office | المكتب
            a gardener | البستاني | a garden | الحديقة
            a carpenter | النجّار | a workshop | الورشة
            a pilot | الطيّار | an airplane | الطائرة
            a soldier | الجندي | a camp | المعسكر
        """),
        "heldout": read_entities("""
            a nurse | الممرّض | a hospital | المستشفى
            a surgeon | الجرّاح | a hospital | المستشفى
            a captain | القبطان | a ship | السفينة
            a chemist | الكيميائي | a laboratory | المختبر
            a mechanic | الميكانيكي | a workshop | الورشة
            a secretary | السكرتير | an office | المكتب
            a lawyer | المحامي | a court | المحكمة
            a flight attendant | المضيف الجوي | an airplane | الطائرة
        """),
    },
    {
        "train": read_patterns(
            """
            Where does {x} work? | أين يعمل {x}؟
            What is the workplace of {x}? | ما هو مكان عمل {x}؟
            In what place does {x} spend the working day? | في أي مكان يقضي {x} يوم العمل؟
            Where can I meet {x} at work? | أين أقابل {x} في أثناء العمل؟
            """,
            """
            The place of work is {y}. | مكان العمل هو {y}.
            You can meet this person in {y}. | يمكنك أن تقابل هذا الشخص في {y}.
            The working day is spent in {y}. | يقضي يوم العمل في {y}.
            This work is done in {y}. | هذا العمل يكون في {y}.
            """,
        ),
        "heldout": read_patterns(
            """
            My brother has the job of {x}, so where does he go? | أخي يمارس مهنة {x}، فإلى أين يذهب؟
            Please name the building used by {x}. | اذكر من فضلك المبنى الذي يستعمله {x}.
            """,
            """
            This person is in {y}. | هذا الشخص في {y}.
            The place of this work is {y}. | مكان هذا العمل هو {y}.
            """,
        ),
    },
)

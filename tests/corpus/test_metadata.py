"""metadata.py: golden renderings of the BigScience format, reading, annotation, draws; records made here."""
import collections

import numpy as np
import pytest
from test_prepare_metadata import item, rendered, tag

from configurator import UserError
from corpus import metadata

# --- rendering ---

@pytest.mark.parametrize('one, expected', [
    (item('url', 'https://a.org/Year%202021/a+b'), 'url: https://a.org/Year 2021/a b |||'),
    (item('timestamp', '2018-12-10T13:45:00.000Z'), 'Year: 2018 | Month: December |||'),
    (item('timestamp', '2024-04-25T16:24:44Z'), 'Year: 2024 | Month: April |||'),
    (item('title', 'On Zeros'), 'Title: On Zeros |||'),
    (item('website_description', 'A site.'), 'Website Description: A site. |||'),
    (item('datasource', 'a.org'), 'Datasource: a.org |||'),
    (item('length', '312'), 'Text Length: 312 |||')])
def test_golden_prefix_of_each_type(one, expected):
    """modeling-metadata's prefix, letter by letter; timestamps of both precisions occur in real data."""
    assert metadata.prefix_of({one['key']: [one]}, metadata.TYPES) == expected


def test_prefix_takes_the_order_of_the_types_and_the_last_of_several():
    """Items are joined in the order that the user gave, whatever the record's."""
    items = dict(title=[item('title', 'old'), item('title', 'T')], url=[item('url', 'u')])
    assert metadata.prefix_of(items, ('url', 'title')) == 'url: u | Title: T |||'
    assert metadata.prefix_of(items, ('title', 'url')) == 'Title: T | url: u |||'
    assert metadata.prefix_of(items, ('length',)) == ''


@pytest.mark.parametrize('text, items, expected', [
    ('Biden won', [item('entity', 'Joe Biden', 0, 5)], 'Biden [[Joe Biden]] won'),
    ('It was. So.', [item('length', '7', 0, 7)], '[length: 7]It was.[/length: 7] So.'),
    ('It was. So.', [item('paragraph', 'p', 8, 11)], 'It was. [paragraph: p]So.[/paragraph: p]')])
def test_golden_local_types(text, items, expected):
    """An entity's name comes after the mention; what has no form of its own is in square brackets."""
    found = {('length_sentence' if i['key'] == 'length' else i['key']): [i] for i in items}
    assert ''.join(s for s, _ in metadata.segments_of(text, found, metadata.TYPES)) == expected


@pytest.mark.parametrize('text, items, expected', [
    # 1. attributes: class and id stay, href goes
    ('go on', [tag('a', 0, 2, 0, 0, href='/x', class_='k j', id='i')], '<a class:k j id:i>go</a> on'),
    # 2. nested at equal positions on both sides: the relative positions say that b is outside i
    ('go', [tag('i', 0, 2, 1, 0), tag('b', 0, 2, 0, 1)], '<b><i>go</i></b>'),
    # 3. an empty tag between two that touch: </b> closes, <br> opens and closes, <i> opens, all at index 2
    ('goon', [tag('b', 0, 2, 0, 0), tag('br', 2, 2, 1, 2), tag('i', 2, 4, 3, 0)], '<b>go</b><br></br><i>on</i>'),
    # 4. an empty tag inside an empty tag, at the end of the text
    ('go', [tag('b', 2, 2, 0, 3), tag('i', 2, 2, 1, 2)], 'go<b><i></i></b>'),
    # 5. the same as 2 and 3 without relative positions: closers, empty ones, openers; the wider span is outside
    ('goon', [tag('i', 0, 2), tag('b', 0, 4), tag('br', 2, 2), tag('u', 2, 4)], '<b><i>go</i><br></br><u>on</u></b>'),
    # 6. equal spans without relative positions: a later item is the outer one; two empty ones nest alike
    ('go', [tag('i', 0, 2), tag('b', 0, 2), tag('p', 0, 0), tag('q', 0, 0)], '<q><p></p></q><b><i>go</i></b>')])
def test_golden_html_nesting(text, items, expected):
    """Six cases worked out by hand from modeling-metadata's rules."""
    assert rendered(text, *items) == expected


def test_an_entity_inside_html_closes_before_the_tags():
    """Two types at one index: closers of spans, then html's block, which its own positions order."""
    assert rendered('go on', tag('b', 0, 2, 0, 0), item('entity', 'Go', 0, 2)) == '<b>go [[Go]]</b> on'


# --- reading and annotation ---

@pytest.mark.parametrize('record, message', [
    (dict(url='u'), 'has no text, it has url'),
    (dict(text='', metadata=[]), 'has no text'),
    (dict(text='four', metadata=[item('entity', 'x', 2, 9)]), 'entity spans characters 2 to 9 of a text of 4'),
    (dict(text='four', metadata=[item('entity', 'x', 3, 2)]), 'spans characters 3 to 2'),
    (dict(text='four', metadata=[item('entity', 'x', 'a', 2)]), 'spans characters a to 2'),
    (dict(text='four', metadata_html=[tag('b', 0, 3), tag('i', 2, 4)]), 'html spans overlap, one to 3 and one from 2'),
    (dict(text='four', metadata=['x']), "metadata item x, expected key, type"),
    (dict(html='<![x<p>'), 'html that cannot be parsed')])
def test_bad_records(record, message):
    """One line with the place, the value, the expectation."""
    with pytest.raises(UserError, match=r'f:3') as e:
        metadata.read_record(record, 'f:3')
    assert message in str(e.value) and '\n' not in str(e.value)


def test_both_forms_of_a_record_read_alike():
    """A list, or one column per type, as C4's version has them; a sentence's length is not the text's."""
    items = [item('url', 'u'), item('length', '2', 0, 2), item('length', '4')]
    listed = metadata.read_record(dict(text='four', metadata=items), 'x')
    columns = metadata.read_record(dict(text='four', metadata_url=items[:1], metadata_a=items[1:2], other=3,
                                        metadata_b=items[2:], metadata_empty=[], metadata_none=None), 'x')
    assert listed == columns and set(listed[1]) == {'url', 'length', 'length_sentence'}


@pytest.mark.parametrize('url, expected', [
    ('https://a.org/2018/12/10/x', '2018-12-10T00:00:00.000Z'), ('https://a.org/2018-03-x.html', '2018-03-01T'),
    ('https://a.org/1982/12/x', ''), ('https://a.org/2022/12/x', ''), ('https://a.org/2018/13/x', ''),
    ('https://a.org/120181/2', ''), ('https://2018/x', '')])
def test_timestamp_of_a_url(url, expected):
    """From the path alone, 1983 to 2021, as the source does."""
    found = metadata.timestamp_of(url)
    assert found.startswith(expected) and bool(found) == bool(expected)


def test_annotation_of_a_page():
    """Text, spans and title of a page; script, style, header, footer, iframe and form are gone; tags are nested."""
    html = ('<html><head><title>A  &amp; B</title><style>p{}</style>'
            '<link rel="canonical" href="https://a.org/2018/12/x"></head><body><header>no</header>'
            '<p id=i>One <b>two</b>&nbsp;<i>three</i><br>four<p>five<script>x<y</script>'
            '<form><input>no</form><ul><li>a<li>b</ul><footer>no</footer></body></html>')
    text, found = metadata.read_record(dict(html=html), 'x')
    assert text == 'One two three\nfour\nfive\na\nb'
    assert rendered(text, *found['html']) == ('<p id:i>One <b>two</b> <i>three</i>\n<br></br>four</p>\n<p>five\n'
                                              '<ul><li>a</li>\n<li>b</li></ul></p>')
    assert metadata.prefix_of(found, metadata.TYPES) == (
        'url: https://a.org/2018/12/x | Year: 2018 | Month: December | Datasource: a.org | Title: A & B |'
        f' Text Length: {len(text)} |||')
    metadata.check_nesting(found['html'], 'html', 'x')


# --- draws ---

def test_types_are_drawn_by_weight():
    """k is uniform in 1 to n; html leaves with 0.75 where it is not alone; a rare type is drawn more."""
    rng, weights, found = np.random.default_rng(0), dict(url=1.0, title=4.0, html=1.0), collections.Counter()
    sizes = collections.Counter()
    for _ in range(4000):
        drawn = metadata.draw_types(['url', 'title'], weights, rng)
        sizes[len(drawn)] += 1
        found.update(drawn if len(drawn) == 1 else [])
    assert abs(sizes[1] / 4000 - 0.5) < 0.03 and abs(found['title'] / sizes[1] - 0.8) < 0.04
    with_html = sum('html' in metadata.draw_types(['url', 'html'], weights, rng) for _ in range(4000)) / 4000
    assert abs(with_html - 0.25 * 0.75) < 0.03          # k = 2: always, k = 1: half
    assert metadata.draw_types(['html'], weights, rng) == ['html']

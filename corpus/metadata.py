"""Documents with metadata: reading the BigScience record format, making it from plain records, rendering it as text.

A record is {"text": ..., "metadata": [item, ...]} or has a column metadata_<type> of items for each type. A global item
has key, type "global", value; a local one type "local", char_start_idx, char_end_idx (exclusive), value, and for html
html_attrs {attrs, values}; relative_start_pos and relative_end_pos give the order of tags at one index. A record with
neither is annotated here: url, timestamp (of the url's path), datasource, title, length, html. Documents are text and
items; offsets are in characters (BigScience modeling-metadata).
"""
import re
from html.parser import HTMLParser
from typing import NamedTuple
from urllib.parse import unquote_plus, urlsplit

from configurator import UserError, require
from corpus.documents import text_bytes_of

TYPES = ('url', 'timestamp', 'datasource', 'title', 'website_description', 'length', 'html', 'entity', 'paragraph',
         'length_sentence')
MONTHS = ('January February March April May June July August September October November December').split()
TITLES = dict(title='Title', website_description='Website Description', datasource='Datasource', length='Text Length')
CLOSE = ' |||'                          # ends a prefix
PLAIN = ('url', 'title', 'datasource', 'timestamp', 'website_description')      # columns of a plain record
SHOWN_ATTRIBUTES = ('class', 'id')      # of html


# --- reading ---

def read_record(record, where):
    """Return (text, {type: [items]}) of a record; annotate it where it has no metadata. where: for messages."""
    # None is a table's way to have no such column.
    lists = [value for key, value in record.items() if key.startswith('metadata_') and value is not None]
    if record.get('metadata') is not None:
        lists = [record['metadata']]
    if not lists:
        return annotate(record, where)
    text = text_of(record, where)
    items = {}
    for one in lists:
        for item in one or ():
            check_item(item, text, where)
            items.setdefault(type_of(item), []).append(item)
    for name, of_type in items.items():
        check_nesting([item for item in of_type if item['type'] == 'local'], name, where)
    return text, items


def type_of(item):
    """Return the type of an item, one of TYPES: its key, but for the length of a sentence, which is not the text's."""
    if item['key'] == 'length' and item['type'] == 'local':
        return 'length_sentence'
    return item['key']


def check_item(item, text, where):
    """Raise UserError where an item is none, or spans characters that the text does not have."""
    is_item = isinstance(item, dict) and isinstance(item.get('key'), str) and item.get('type') in ('global', 'local')
    if not is_item:
        raise UserError(f'{where} has the metadata item {str(item)[:80]}, expected key, type (global or local), value')
    if item['type'] == 'global':
        return
    start = item.get('char_start_idx')
    end = item.get('char_end_idx')
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= len(text)):
        raise UserError(f'{where}: {type_of(item)} spans characters {start} to {end} of a text of {len(text):,},'
                        ' expected 0 <= start <= end <= length; mend the record or --skip_broken=True')


def text_of(record, where):
    """Return the text of a record, without lone surrogates."""
    text = record.get('text')
    require((isinstance(text, str) and text, f'{where} has no text, it has {", ".join(record)[:200] or "nothing"};'
             ' expected {"text": "...", ...}; mend the record or --skip_broken=True'))
    return text_bytes_of(text, where).decode()


def check_nesting(items, name, where):
    """Raise UserError where two spans of local items overlap without one inside the other."""
    spans = [(item['char_start_idx'], item['char_end_idx']) for item in items]
    open_ends = []
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if open_ends and end > open_ends[-1]:
            raise UserError(f'{where}: {name} spans overlap, one to {open_ends[-1]} and one from {start} to {end},'
                            ' expected spans side by side or inside each other; mend the record or --skip_broken=True')
        open_ends.append(end)


# --- rendering ---

def global_text(item):
    """Return a global item as it stands in a prefix."""
    key = item['key']
    value = str(item['value'])
    if key == 'url':
        return f'url: {unquote_plus(value)}'
    if key == 'timestamp':
        date = re.match(r'(\d{4})-(\d\d)', value)
        if not date or not 1 <= int(date[2]) <= 12:
            raise UserError(f'timestamp {value[:40]!r}, expected one such as 2018-12-10T13:45:00Z; mend the record or'
                            ' --skip_broken=True')
        return f'Year: {int(date[1])} | Month: {MONTHS[int(date[2]) - 1]}'
    return f'{TITLES.get(key, key)}: {value}'


def local_text(item):
    """Return what stands before and after the span of a local item."""
    key = item['key']
    value = item['value']
    if key == 'html':
        attrs = item.get('html_attrs') or dict(attrs=(), values=())
        pairs = zip(attrs['attrs'], attrs['values'])
        shown = ''.join(f' {name}:{content}' for name, content in pairs if name in SHOWN_ATTRIBUTES)
        return f'<{value}{shown}>', f'</{value}>'
    if key == 'entity':
        return '', f' [[{value}]]'
    return f'[{key}: {value}]', f'[/{key}: {value}]'


def prefix_of(items, types):
    """Return the prefix of the global items {type: [items]} of some types, in their order; '' where there are none.

    Of several items of one type the last counts.
    """
    texts = []
    for t in types:
        of_text = [item for item in items.get(t, ()) if item['type'] == 'global']
        if of_text:
            texts.append(global_text(of_text[-1]))
    return ' | '.join(texts) + CLOSE if texts else ''


# What stands at one index of a text, in this order: closers of spans that are not empty (inner first), openers of
# empty ones, closers of empty ones, openers of the others (outer first).
CLOSER, EMPTY_OPENER, EMPTY_CLOSER, OPENER = range(4)


class Markup(NamedTuple):
    """A piece of markup; sorted, those at one index stand as they are to be read."""
    kind: int                           # CLOSER to OPENER
    order: tuple                        # among those of one kind
    number: int                         # the earlier one first where all else is equal
    text: str


def markup_at(items, types):
    """Return {index: markup} of the local items of some types.

    Tags that give relative positions are ordered by these and count as empty.
    """
    places = {}                         # index: [Markup]

    def put(index, kind, order, text):
        here = places.setdefault(index, [])
        here.append(Markup(kind, order, len(here), text))

    n = 0
    for t in types:
        local = [item for item in items.get(t, ()) if item['type'] == 'local']
        n += 1
        if local and all(map(has_relative_positions, local)):
            for item in local:
                before, after = local_text(item)
                put(item['char_start_idx'], EMPTY_OPENER, (-n, item['relative_start_pos']), before)
                put(item['char_end_idx'], EMPTY_OPENER, (-n, item['relative_end_pos']), after)
            continue

        # Of equal spans a later item is the outer one.
        for item in sorted(local, key=lambda item: item['char_end_idx']):
            n += 1
            start = item['char_start_idx']
            end = item['char_end_idx']
            before, after = local_text(item)
            if start == end:
                put(start, EMPTY_OPENER, (-n,), before)
                put(end, EMPTY_CLOSER, (n,), after)
            else:
                put(start, OPENER, (-end, -n), before)
                put(end, CLOSER, (-start, n), after)
    return {index: ''.join(markup.text for markup in sorted(here)) for index, here in places.items()}


def has_relative_positions(item):
    return item.get('relative_start_pos') is not None and item.get('relative_end_pos') is not None


def segments_of(text, items, types):
    """Return a text with the markup of some types in its line, as [(string, is markup)]; strings are not empty."""
    segments = []
    done = 0
    for index, markup in sorted(markup_at(items, types).items()):
        segments.append((text[done:index], False))
        segments.append((markup, True))
        done = index
    segments.append((text[done:], False))
    return [segment for segment in segments if segment[0]]


# --- which types a document is given ---

def draw_types(present, weights, rng):
    """Draw the types of one example, in the order of present: 1 to n of the n that it has, without replacement.

    html is left out with probability 0.75 where it is not the only one. weights {type: float}, about 1 / frequency.
    """
    names = [t for t in present if t != 'html' or len(present) == 1 or rng.random() >= 0.75]
    n_drawn = rng.integers(1, len(names) + 1)
    total = sum(weights[t] for t in names)
    drawn = rng.choice(len(names), n_drawn, replace=False, p=[weights[t] / total for t in names])
    return [names[i] for i in sorted(drawn)]


# --- annotation ---

def annotate(record, where):
    """Return (text, {type: [items]}) of a plain record: text or html, and what of url, title, timestamp it has."""
    record = dict(record)
    items = {}
    html = record.get('html')
    if not record.get('text') and isinstance(html, str) and html:
        page = parse_html(html, where)
        record['text'] = page.text
        record['title'] = record.get('title') or page.title
        record['url'] = record.get('url') or page.url
        items['html'] = page.items
    text = text_of(record, where)
    url = record.get('url')
    if isinstance(url, str) and url:
        record['timestamp'] = record.get('timestamp') or timestamp_of(url)
        record['datasource'] = record.get('datasource') or urlsplit(url).netloc
    record['length'] = str(len(text))
    for key in (*PLAIN, 'length'):
        if value := record.get(key):
            items[key] = [dict(key=key, type='global', value=str(value))]
    return text, items


def timestamp_of(url):
    """Return the first day, or the month, that a url's path names between 1983 and 2021, else ''."""
    date = re.search(r'(?<!\d)(\d{4})[/_-](0?[1-9]|1[0-2])(?:[/_-](0?[1-9]|[12]\d|3[01]))?(?!\d)', urlsplit(url).path)
    if not date or not 1983 <= int(date[1]) <= 2021:
        return ''
    return f'{date[1]}-{int(date[2]):02}-{int(date[3] or 1):02}T00:00:00.000Z'


class Page(HTMLParser):
    """Text of a page and the spans of its tags; white space is collapsed, blocks begin on a line of their own."""

    DROPPED = {'script', 'style', 'header', 'footer', 'iframe', 'form', 'head', 'title'}
    VOID = {'area', 'base', 'br', 'col', 'embed', 'hr', 'img', 'input', 'link', 'meta', 'source', 'track', 'wbr'}
    ALONE = {'p', 'li', 'td', 'th', 'tr', 'dt', 'dd', 'option'}
    BLOCKS = {'address', 'article', 'aside', 'blockquote', 'br', 'dd', 'div', 'dl', 'dt', 'figure', 'h1', 'h2', 'h3',
              'h4', 'h5', 'h6', 'hr', 'li', 'main', 'nav', 'ol', 'p', 'pre', 'section', 'table', 'td', 'th', 'tr', 'ul'}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts = []                 # of the text
        self.length = 0                 # of the text so far
        self.gap = ''                   # white space that stands before what comes next
        self.title = ''
        self.in_title = False
        self.url = ''
        self.items = []                 # of closed tags
        self.open = []                  # items of tags that are open, the inner one last
        self.dropped = []               # open tags whose content is no text
        self.events = {}                # index: last relative position given

    def next_event(self):
        """Return the next relative position at the place where the text ends now."""
        self.events[self.length] = self.events.get(self.length, -1) + 1
        return self.events[self.length]

    def put(self, text):
        """Append to the text."""
        self.parts.append(text)
        self.length += len(text)

    def flush_gap(self):
        """Append the white space before what comes next, unless there is some or nothing before it."""
        if self.gap and self.length and not self.parts[-1][-1].isspace():
            self.put(self.gap)
        self.gap = ''

    def handle_starttag(self, tag, attrs):
        attrs = [(name, value or '') for name, value in attrs]
        by_name = dict(attrs)
        if tag == 'link' and by_name.get('rel') == 'canonical':
            href = by_name.get('href', '')
            self.url = href if href.startswith('http') else ''
        self.in_title = tag == 'title' and not self.title
        if tag in self.DROPPED:
            self.dropped.append(tag)
        if self.dropped or tag in ('html', 'body'):
            return
        if tag in self.ALONE and self.open and self.open[-1]['value'] == tag:
            self.close_tag()                            # <li> ends the <li> before it
        if tag in self.BLOCKS:
            self.gap = '\n'
        self.flush_gap()
        names = [name for name, _ in attrs]
        values = [value for _, value in attrs]
        self.open.append(dict(
            key='html', type='local', char_start_idx=self.length, relative_start_pos=self.next_event(), value=tag,
            html_attrs=dict(attrs=names, values=values)))
        if tag in self.VOID:
            self.close_tag()

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:                        # those are closed already
            self.handle_endtag(tag)

    def close_tag(self):
        """Close the tag that was opened last."""
        item = self.open.pop()
        self.items.append(dict(item, char_end_idx=self.length, relative_end_pos=self.next_event()))
        if item['value'] in self.BLOCKS:
            self.gap = '\n'

    def handle_endtag(self, tag):
        self.in_title = False
        if tag in self.dropped:
            while self.dropped.pop() != tag:
                pass
        elif not self.dropped and any(item['value'] == tag for item in self.open):
            while self.open[-1]['value'] != tag:        # what stands open inside ends here too
                self.close_tag()
            self.close_tag()

    def handle_data(self, data):
        if self.in_title:
            self.title += data
        if self.dropped or self.in_title:
            return
        words = data.split()
        if not words or data[0].isspace():
            self.gap = self.gap or ' '
        if words:
            self.flush_gap()
            self.put(' '.join(words))
            self.gap = ' ' if data[-1].isspace() else ''


def parse_html(html, where):
    """Return a Page: text, title, url (canonical, '' if not given) and items of the tags, inner ones first."""
    page = Page()
    try:
        page.feed(html)
        page.close()
    except (AssertionError, ValueError) as e:                           # the parser's own way to give up
        raise UserError(f'{where}: html that cannot be parsed ({e}); mend it or --skip_broken=True') from None
    while page.open:
        page.close_tag()
    page.text = ''.join(page.parts)
    page.title = ' '.join(page.title.split())
    return page

"""Documents with metadata: reading the BigScience record format, making it from plain records, rendering it as text.

A record is {"text": ..., "metadata": [item, ...]} or has a column metadata_<type> of items for each type. A global item
has key, type "global", value; a local one type "local", char_start_idx, char_end_idx (exclusive), value, and for html
html_attrs {attrs, values}; relative_start_pos and relative_end_pos give the order of tags at one index. A record with
neither is annotated here: url, timestamp (of the url's path), datasource, title, length, html. Documents are text and
items; offsets are in characters (BigScience modeling-metadata).
"""
import re
from html.parser import HTMLParser
from urllib.parse import unquote_plus, urlsplit

from configurator import UserError, require
from corpus.documents import text_bytes_of

TYPES = ('url', 'timestamp', 'datasource', 'title', 'website_description', 'length', 'html', 'entity', 'paragraph',
         'length_sentence')
MONTHS = ('January February March April May June July August September October November December').split()
TITLES = dict(title='Title', website_description='Website Description', datasource='Datasource', length='Text Length')
CLOSE = ' |||'                          # ends a prefix
PLAIN = ('url', 'title', 'datasource', 'timestamp', 'website_description')      # columns of a plain record
KEPT = ('class', 'id')                  # attributes of html that are rendered


# --- reading ---

def read_record(record, where):
    """Return (text, {type: [items]}) of a record; annotate it where it has no metadata. where: for messages."""
    columns = [v for k, v in record.items() if k.startswith('metadata_') and v is not None]
    if record.get('metadata') is None and not columns:                  # None: a table's way to have no such column
        return annotate(record, where)
    text = text_of(record, where)
    lists, found = columns if record.get('metadata') is None else [record['metadata']], {}
    for item in (item for one in lists for item in one or ()):
        if not (isinstance(item, dict) and isinstance(item.get('key'), str)
                and item.get('type') in ('global', 'local')):
            raise UserError(f'{where} has the metadata item {str(item)[:80]}, expected key, type (global or local),'
                            ' value')
        key = 'length_sentence' if (item['key'], item['type']) == ('length', 'local') else item['key']
        if item['type'] == 'local':
            start, end = item.get('char_start_idx'), item.get('char_end_idx')
            if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= len(text)):
                raise UserError(f'{where}: {key} spans characters {start} to {end} of a text of {len(text):,},'
                                ' expected 0 <= start <= end <= length; mend the record or --skip_broken=True')
        found.setdefault(key, []).append(item)
    for key, items in found.items():
        check_nesting([i for i in items if i['type'] == 'local'], key, where)
    return text, found


def text_of(record, where):
    text = record.get('text')
    require((isinstance(text, str) and text, f'{where} has no text, it has {", ".join(record)[:200] or "nothing"};'
             ' expected {"text": "...", ...}; mend the record or --skip_broken=True'))
    return text_bytes_of(text, where).decode()                          # without lone surrogates


def check_nesting(items, key, where):
    """Raise UserError where two spans overlap without one inside the other."""
    open_ends = []
    for start, end in sorted(((i['char_start_idx'], i['char_end_idx']) for i in items), key=lambda s: (s[0], -s[1])):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if open_ends and end > open_ends[-1]:
            raise UserError(f'{where}: {key} spans overlap, one to {open_ends[-1]} and one from {start} to {end},'
                            ' expected spans side by side or inside each other; mend the record or --skip_broken=True')
        open_ends.append(end)


# --- rendering ---

def global_text(item):
    """Return a global item as it stands in a prefix."""
    key, value = item['key'], str(item['value'])
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
    key, value = item['key'], item['value']
    if key == 'html':
        attrs = item.get('html_attrs') or dict(attrs=(), values=())
        kept = ''.join(f' {a}:{v}' for a, v in zip(attrs['attrs'], attrs['values']) if a in KEPT)
        return f'<{value}{kept}>', f'</{value}>'
    if key == 'entity':
        return '', f' [[{value}]]'
    return f'[{key}: {value}]', f'[/{key}: {value}]'


def prefix_of(items, types):
    """Return the prefix of the global items {type: [items]} of some types, in their order; '' where there are none.

    Of several items of one type the last counts.
    """
    parts = [[i for i in items.get(t, ()) if i['type'] == 'global'][-1:] for t in types]
    parts = [global_text(item) for part in parts for item in part]
    return ' | '.join(parts) + CLOSE if parts else ''


def markup_at(items, types):
    """Return {index: markup} of the local items of some types.

    At one index: closers of spans that are not empty (inner first), openers of empty ones, closers of empty ones,
    openers of the others (outer first). Tags that give relative positions are ordered by these and count as empty.
    """
    places = {}                         # index: (closers, empty openers, empty closers, openers), as (order, text)

    def put(index, kind, order, text):
        places.setdefault(index, ([], [], [], []))[kind].append((order, text))

    n = 0
    for t in types:
        local = [i for i in items.get(t, ()) if i['type'] == 'local']
        n += 1
        if local and all(i.get(f'relative_{side}_pos') is not None for i in local for side in ('start', 'end')):
            for i in local:
                for side, text in zip(('start', 'end'), local_text(i)):
                    put(i[f'char_{side}_idx'], 1, (-n, i[f'relative_{side}_pos']), text)
            continue
        for i in sorted(local, key=lambda i: i['char_end_idx']):        # of equal spans a later item is the outer one
            n, start, end, (before, after) = n + 1, i['char_start_idx'], i['char_end_idx'], local_text(i)
            put(start, 1 if start == end else 3, (-n,) if start == end else (-end, -n), before)
            put(end, 2 if start == end else 0, (n,) if start == end else (-start, n), after)
    return {index: ''.join(text for kind in at for _, text in sorted(kind, key=lambda pair: pair[0]))
            for index, at in places.items()}


def segments_of(text, items, types):
    """Return a text with the markup of some types in its line, as [(string, is markup)]; strings are not empty."""
    found, done = [], 0
    for index, markup in sorted(markup_at(items, types).items()):
        found += [(text[done:index], False), (markup, True)]
        done = index
    return [part for part in (*found, (text[done:], False)) if part[0]]


# --- which types a document is given ---

def draw_types(present, weights, rng):
    """Draw the types of one example, in the order of present: 1 to n of the n that it has, without replacement.

    html is left out with probability 0.75 where it is not the only one. weights {type: float}, about 1 / frequency.
    """
    names = [t for t in present if t != 'html' or len(present) == 1 or rng.random() >= 0.75]
    p = [weights[t] for t in names]
    drawn = rng.choice(len(names), rng.integers(1, len(names) + 1), replace=False, p=[w / sum(p) for w in p])
    return [names[i] for i in sorted(drawn)]


# --- annotation ---

def annotate(record, where):
    """Return (text, {type: [items]}) of a plain record: text or html, and what of url, title, timestamp it has."""
    record, found, html = dict(record), {}, record.get('html')
    if not record.get('text') and isinstance(html, str) and html:
        page = parse_html(html, where)
        record.update(text=page.text, title=record.get('title') or page.title, url=record.get('url') or page.url)
        found['html'] = page.items
    text, url = text_of(record, where), record.get('url')
    if isinstance(url, str) and url:
        record['timestamp'] = record.get('timestamp') or timestamp_of(url)
        record['datasource'] = record.get('datasource') or urlsplit(url).netloc
    record['length'] = str(len(text))
    for key in (*PLAIN, 'length'):
        if value := record.get(key):
            found[key] = [dict(key=key, type='global', value=str(value))]
    return text, found


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
        self.parts, self.length, self.gap, self.title, self.url = [], 0, '', '', ''
        self.items, self.open, self.dropped, self.events, self.in_title = [], [], [], {}, False

    def next_event(self):
        """Return the next relative position at the place where the text ends now."""
        self.events[self.length] = self.events.get(self.length, -1) + 1
        return self.events[self.length]

    def put(self, text):
        self.parts.append(text)
        self.length += len(text)

    def flush_gap(self):
        if self.gap and self.length and not self.parts[-1][-1].isspace():
            self.put(self.gap)
        self.gap = ''

    def handle_starttag(self, tag, attrs):
        attrs = [(a, v or '') for a, v in attrs]
        if tag == 'link' and dict(attrs).get('rel') == 'canonical':
            href = dict(attrs).get('href', '')
            self.url = href if href.startswith('http') else ''
        self.in_title = tag == 'title' and not self.title
        if tag in self.DROPPED:
            self.dropped.append(tag)
        if self.dropped or tag in ('html', 'body'):
            return
        if tag in self.ALONE and self.open and self.open[-1]['value'] == tag:
            self.close_tag()                            # <li> ends the <li> before it
        self.gap = '\n' if tag in self.BLOCKS else self.gap
        self.flush_gap()
        self.open.append(dict(
            key='html', type='local', char_start_idx=self.length, relative_start_pos=self.next_event(), value=tag,
            html_attrs=dict(attrs=[a for a, _ in attrs], values=[v for _, v in attrs])))
        if tag in self.VOID:
            self.close_tag()

    def handle_startendtag(self, tag, attrs):
        if tag in self.VOID:                            # elsewhere HTML ignores the slash
            self.handle_starttag(tag, attrs)
        else:
            self.handle_starttag(tag, attrs)
            self.handle_endtag(tag)

    def close_tag(self):
        item = self.open.pop()
        self.items.append(dict(item, char_end_idx=self.length, relative_end_pos=self.next_event()))
        if item['value'] in self.BLOCKS:
            self.gap = '\n'

    def handle_endtag(self, tag):
        self.in_title = False
        if tag in self.dropped:
            while self.dropped.pop() != tag:
                pass
        elif not self.dropped and any(i['value'] == tag for i in self.open):
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
    page.text, page.title = ''.join(page.parts), ' '.join(page.title.split())
    return page

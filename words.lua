-- A short word with hyphens, such as X-Unet or COVID-19, stays in one line of a table, and sentences in tables of
-- pandas are marked as such; styles.css has both classes.
-- Quarto and tools/preview.py run this filter; tools/docs.py copies it to nbs/.
local WORD, LONGEST = '[%w_.]+%-[%w_.%-]*%w', 16
local SENTENCE = 41 -- characters

local function is_short(text)
  local word = text:match(WORD)
  return word and #word <= LONGEST
end

local function whole(text)
  return is_short(text) and '<span class="word">' .. text .. '</span>' or text
end

local function mark_sentences(t)
  for _, body in ipairs(t.bodies) do
    for _, row in ipairs(body.body) do
      for i, cell in ipairs(row.cells) do
        local said = #pandoc.utils.stringify(cell.contents) >= SENTENCE
        if i > body.row_head_columns and said then cell.classes:insert('sentence') end
      end
    end
  end
  return t
end

function Table(t) -- Quarto makes tables of those of pandas, too
  if t.classes:includes('dataframe') then t = mark_sentences(t) end
  return t:walk({
    Str = function(s) return is_short(s.text) and pandoc.Span({ s }, { class = 'word' }) or nil end,
  })
end

function RawBlock(b) -- of pandas, for Pandoc alone
  if b.format:find('html') then
    local text = b.text:gsub('<table.-</table>', function(t)
      t = t:gsub('<td>([^<]+)', function(s) return #s >= SENTENCE and '<td class="sentence">' .. s or nil end)
      return (t:gsub('>[^<>]+<', function(said) return (said:gsub(WORD, whole)) end))
    end)
    return pandoc.RawBlock(b.format, text)
  end
end

-- Finds the uploads that entries of the stream name, a part of the stream at a time.
--
-- KEYS    1 stream
-- ARGV    1 id after which the part begins, '' at first; 2 bytes after which no more is looked at; 3... SHA-256 of the
--         uploads to look for
-- result  the id after which the next part begins, '' if there is none; those that were found; number of commands
local last, bytes, found, named, commands, PAGE = ARGV[1], tonumber(ARGV[2]), {}, {}, 1, 16
local is_end
repeat
  local rows = redis.call('XRANGE', KEYS[1], last == '' and '-' or '(' .. last, '+', 'COUNT', PAGE)
  commands, is_end = commands + 1, #rows < PAGE
  for i, row in ipairs(rows) do
    for _, value in ipairs(row[2]) do
      for sha256 in string.gmatch(value, 'upload:(%x+)') do named[sha256] = true end
      bytes = bytes - #value
    end
    last = row[1]
    if bytes <= 0 then
      is_end = is_end and i == #rows
      break
    end
  end
until is_end or bytes <= 0
for i = 3, #ARGV do
  if named[ARGV[i]] then found[#found + 1] = ARGV[i] end
end
return {is_end and '' or last, found, commands}

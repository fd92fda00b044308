-- Finds the uploads that entries of the stream name, a page of entries at a time.
--
-- KEYS    1 stream
-- ARGV    1 id after which the page begins, '' at first; 2 entries of a page; 3... SHA-256 of the uploads to look for
-- result  the id after which the next page begins, '' if there is none, and those that were found
local rows = redis.call('XRANGE', KEYS[1], ARGV[1] == '' and '-' or '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
local found, named = {}, {}
for _, row in ipairs(rows) do
  for _, value in ipairs(row[2]) do
    for sha256 in string.gmatch(value, 'upload:(%x+)') do named[sha256] = true end
  end
end
for i = 3, #ARGV do
  if named[ARGV[i]] then found[#found + 1] = ARGV[i] end
end
return {#rows == tonumber(ARGV[2]) and rows[#rows][1] or '', found}

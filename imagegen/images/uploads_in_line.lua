-- Finds the uploads that the tasks of a line name, a page of the line at a time from its end.
--
-- KEYS    1 line
-- ARGV    1 elements behind the page; 2 elements of a page; 3... SHA-256 of the uploads to look for
-- result  1 if there are elements before the page, else 0; and those that were found
local last, length = -1 - tonumber(ARGV[1]), tonumber(ARGV[2])
local elements = redis.call('LRANGE', KEYS[1], last - length + 1, last)
local found, named = {}, {}
for _, element in ipairs(elements) do
  for sha256 in string.gmatch(element, 'upload:(%x+)') do named[sha256] = true end
end
for i = 3, #ARGV do
  if named[ARGV[i]] then found[#found + 1] = ARGV[i] end
end
return {#elements == length and 1 or 0, found}

-- Finds the uploads that the tasks of a line name.
--
-- KEYS    1 line
-- ARGV    SHA-256 of the uploads to look for
-- result  those that were found
local found, named = {}, {}
for _, element in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
  for sha256 in string.gmatch(element, 'upload:(%x+)') do named[sha256] = true end
end
for _, sha256 in ipairs(ARGV) do
  if named[sha256] then found[#found + 1] = sha256 end
end
return found

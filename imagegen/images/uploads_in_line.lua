-- Finds the uploads that the tasks of a line name, a part of the line at a time from its end.
--
-- KEYS    1 line
-- ARGV    1 elements behind the part; 2 bytes after which no more is looked at; 3... SHA-256 of the uploads to look for
-- result  the elements behind the next part, -1 if there is none; those that were found; number of commands
local passed, bytes, found, named, commands, PAGE = tonumber(ARGV[1]), tonumber(ARGV[2]), {}, {}, 1, 16
local is_end
repeat
  local elements = redis.call('LRANGE', KEYS[1], -passed - PAGE, -passed - 1)
  commands, is_end = commands + 1, #elements < PAGE
  for i = #elements, 1, -1 do
    for sha256 in string.gmatch(elements[i], 'upload:(%x+)') do named[sha256] = true end
    bytes, passed = bytes - #elements[i], passed + 1
    if bytes <= 0 then
      is_end = is_end and i == 1
      break
    end
  end
until is_end or bytes <= 0
for i = 3, #ARGV do
  if named[ARGV[i]] then found[#found + 1] = ARGV[i] end
end
return {is_end and -1 or passed, found, commands}

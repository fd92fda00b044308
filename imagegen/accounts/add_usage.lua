-- Adds the counts of one report to the hash of a day, unless the hash has them already.
--
-- KEYS    1 hash of the day
-- ARGV    1 field of the writer's mark; 2 the mark must be lower than this number; 3 the new mark;
--         4 life of the hash in seconds; then two for each row: its field, its numbers with spaces between
-- result  the mark before, 0 if there was none
local PAGE = 1000 -- rows; `unpack` has a limit
local mark

local function sum(stored, added)
  local numbers, at = {}, 0
  for text in string.gmatch(stored or '', '%S+') do numbers[#numbers + 1] = tonumber(text) or 0 end
  for text in string.gmatch(added, '%S+') do
    at = at + 1
    numbers[at] = (numbers[at] or 0) + tonumber(text)
  end
  for i = 1, #numbers do numbers[i] = string.format('%.0f', numbers[i]) end
  return table.concat(numbers, ' ')
end

for first = 5, #ARGV, PAGE * 2 do
  local fields, written = {ARGV[1]}, {ARGV[1], ARGV[3]}
  for i = first, math.min(first + PAGE * 2 - 1, #ARGV), 2 do fields[#fields + 1] = ARGV[i] end
  local stored = redis.call('HMGET', KEYS[1], unpack(fields))
  if not mark then
    mark = tonumber(stored[1] or 0) or 0
    if mark >= tonumber(ARGV[2]) then return mark end
  end
  for i = 2, #fields do
    written[#written + 1] = fields[i]
    written[#written + 1] = sum(stored[i], ARGV[first + (i - 2) * 2 + 1])
  end
  redis.call('HSET', KEYS[1], unpack(written))
end
if mark == 0 then redis.call('EXPIRE', KEYS[1], ARGV[4]) end
return mark

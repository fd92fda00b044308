-- Finds entries that the group has passed and no consumer holds, as after XGROUP SETID or DELCONSUMER by an operator:
-- no read delivers them.
--
-- KEYS    1 stream
-- ARGV    1 group; 2 lowest id; 3 bytes after which no more is read: each entry comes with its request
-- result  ids; where the next part begins, '' if there is none; number of commands
local stream, group, PAGE = KEYS[1], ARGV[1], 16
local groups = redis.pcall('XINFO', 'GROUPS', stream)
if groups.err then return {{}, '', 2} end
local last
for _, row in ipairs(groups) do
  local fields = {}
  for i = 1, #row, 2 do fields[row[i]] = row[i + 1] end
  if fields['name'] == group then last = fields['last-delivered-id'] end
end
local low, bytes, skipped, commands = ARGV[2], tonumber(ARGV[3]), {}, 2
repeat
  local entries = last and redis.call('XRANGE', stream, low, last, 'COUNT', PAGE) or {}
  commands = commands + 1
  if #entries == 0 then return {skipped, '', commands} end
  local first, final = entries[1][1], entries[#entries][1]
  local held, pending = {}, redis.call('XPENDING', stream, group, first, final, PAGE)
  commands, low = commands + 1, '(' .. final
  for _, row in ipairs(pending) do held[row[1]] = true end
  for _, entry in ipairs(entries) do
    local id = entry[1]
    for _, value in ipairs(entry[2]) do bytes = bytes - #value end
    local is_held = held[id]
    if not is_held and #pending == PAGE then -- claims of deleted entries may have filled the list
      is_held = #redis.call('XPENDING', stream, group, id, id, 1) > 0
      commands = commands + 1
    end
    if not is_held then skipped[#skipped + 1] = id end
  end
  if #entries < PAGE then return {skipped, '', commands} end
until bytes <= 0
return {skipped, low, commands}
